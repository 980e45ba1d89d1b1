"""FLOPs and parameters against the published sizes of the Llama 4 family, and against counting pairs by hand."""

from dataclasses import replace

import pytest

from model.config import AudioConfig, ModelConfig, RopeScaling, VisionConfig
from trainer.flops import flops_per_token, mean_context, parameter_counts

SCOUT = ModelConfig(vision=VisionConfig(), rope_scaling=RopeScaling())
MAVERICK = replace(SCOUT, num_experts=128, moe_layer_step=2, qk_norm=False, rope_scaling=None)
BEHEMOTH = ModelConfig(
    hidden_size=16384, num_layers=96, num_heads=128, num_kv_heads=8, head_dim=128, expert_ffn_size=24064, num_experts=16
)


def billions(count: float) -> float:
    return round(count / 1e9, 3)


def test_scout_has_the_published_parameters():
    counts = parameter_counts(SCOUT)
    assert billions(counts.routed_experts) == 96.637
    assert billions(counts.shared_experts) == 6.040
    assert counts.dense_ffn == 0
    assert billions(counts.attention) == 3.020
    assert counts.router == 3_932_160
    assert (counts.embedding, counts.head) == (202048 * 5120, 202048 * 5120)
    assert (billions(counts.vision), billions(counts.projector)) == (0.851, 0.021)
    assert (billions(counts.text), billions(counts.total)) == (107.770, 108.642)
    assert (billions(counts.active), billions(counts.active - counts.embedding)) == (17.173, 16.138)


def test_maverick_has_the_published_parameters():
    counts = parameter_counts(MAVERICK)
    assert billions(counts.routed_experts) == 386.547
    assert (billions(counts.shared_experts), billions(counts.dense_ffn)) == (3.020, 6.040)
    assert counts.router == 15_728_640
    assert (billions(counts.text), billions(counts.total)) == (400.712, 401.584)
    assert (billions(counts.active), billions(counts.active - counts.embedding)) == (17.185, 16.150)


def test_behemoth_has_the_planned_parameters():
    counts = parameter_counts(BEHEMOTH)
    assert (round(counts.total / 1e9, 1), round(counts.active / 1e9, 1)) == (1991.7, 288.5)
    assert counts.vision == counts.projector == 0


def test_tied_embeddings_count_once():
    tied, untied = parameter_counts(replace(SCOUT, tie_embeddings=True)), parameter_counts(SCOUT)
    assert untied.total - tied.total == untied.active - tied.active == 202048 * 5120
    assert flops_per_token(replace(SCOUT, tie_embeddings=True), 8192) == flops_per_token(SCOUT, 8192)


@pytest.mark.parametrize("model", [SCOUT, MAVERICK])
def test_training_costs_six_flops_per_active_weight_plus_attention(model):
    flops, counts = flops_per_token(model, 8192), parameter_counts(model)
    products = counts.active - counts.embedding - counts.norms
    assert flops.training - 3 * flops.attention_scores == pytest.approx(6 * products, rel=1e-12)
    # 36 chunked layers with a mean context of about 4096 inside a full chunk, 12 global layers with about S/2.
    attention = 12 * 40 * 128 * (36 * 4096 + 12 * 4096)
    assert 3 * flops.attention_scores == pytest.approx(attention, rel=2e-4)
    assert flops.training == pytest.approx(6 * 16.14e9 + attention, rel=2e-3)


def test_chunks_bound_the_context_of_rotary_layers_only():
    short, long = flops_per_token(SCOUT, 8192), flops_per_token(SCOUT, 65536)
    chunked, whole = 36 * 8193 / 2, 12 * 65537 / 2
    assert long.attention_scores == 4 * 40 * 128 * (chunked + whole)
    assert replace(long, attention_scores=0) == replace(short, attention_scores=0)


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (7, 3), (8, 4), (9, 4), (5, 100), (6, None)])
def test_mean_context_counts_the_allowed_pairs(length, chunk):
    size = chunk or length
    pairs = sum(k <= q and q // size == k // size for q in range(length) for k in range(length))
    assert mean_context(length, chunk) == pairs / length


def test_top_k_multiplies_only_the_routed_experts():
    one, two = flops_per_token(SCOUT, 512), flops_per_token(replace(SCOUT, experts_per_token=2), 512)
    assert two.routed_experts == 2 * one.routed_experts == 2 * one.shared_experts
    assert two.training - one.training == 3 * one.routed_experts


def test_dense_layers_cost_their_own_width():
    model = replace(SCOUT, num_layers=4, moe_layers=(1,), dense_ffn_size=100, expert_ffn_size=7)
    flops = flops_per_token(model, 16)
    assert (flops.dense_ffn, flops.shared_experts) == (3 * 6 * 5120 * 100, 6 * 5120 * 7)


def test_a_tile_costs_two_flops_per_weight_and_patch_plus_attention():
    model = ModelConfig(
        hidden_size=10,
        vision=VisionConfig(
            image_size=8, patch_size=2, hidden_size=6, num_layers=3, ffn_size=5, shuffle=2, adapter_size=7
        ),
    )
    embed = 16 * (3 * 4 * 6)
    blocks = 3 * (17 * (4 * 36 + 2 * 30) + 2 * 17 * 17 * 6)
    adapter = 4 * (24 * 7 + 7 * 7 + 7 * 10)
    flops = flops_per_token(model, 16)
    assert flops.vision_per_tile == 2 * (embed + blocks + adapter)
    assert flops.training_step(tokens=10, tiles=3) == 3 * (10 * flops.forward + 3 * flops.vision_per_tile)
    assert flops_per_token(replace(model, vision=None), 16).training_step(10, 3) == 30 * flops.forward


def test_a_window_of_sound_costs_two_flops_per_weight_and_output_plus_attention():
    audio = AudioConfig(mel_bins=5, window_frames=32, hidden_size=6, num_layers=3, num_heads=2, ffn_size=7)
    model = ModelConfig(hidden_size=10, audio=audio)
    convolutions = 16 * 3 * 5 * 6 + 8 * 3 * 6 * 6 + 4 * 3 * 6 * 6
    blocks = 3 * (4 * (4 * 36 + 2 * 42) + 2 * 4 * 4 * 6)
    flops = flops_per_token(model, 16)
    assert flops.audio_per_window == 2 * (convolutions + blocks + 4 * 6 * 10)
    assert flops.training_step(10, 0, windows=3) == 3 * (10 * flops.forward + 3 * flops.audio_per_window)
    assert f"audio windows/s x {flops.training_per_window:.4g}" in flops.formula
    assert replace(flops, audio_per_window=0.0) == flops_per_token(replace(model, audio=None), 16)
    assert "audio" not in flops_per_token(SCOUT, 8192).formula


def test_the_formula_states_its_own_numbers():
    flops = flops_per_token(SCOUT, 8192)
    assert f"tokens/s x {flops.training:.4g}" in flops.formula
    assert f"tiles/s x {flops.training_per_tile:.4g}" in flops.formula
    assert "tiles/s" not in flops_per_token(replace(SCOUT, vision=None), 8192).formula
