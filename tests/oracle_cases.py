"""Random models and packed batches, and the comparison of the shipped objective with the oracle on them."""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from model.config import AudioConfig, ModelConfig, VisionConfig
from tests import oracle
from trainer import step
from trainer.config import ObjectiveConfig
from trainer.objective import next_token_objective
from trainer.step import Skeleton

COEFFICIENTS = ObjectiveConfig(load_balance_coef=0.3, router_z_coef=0.1, block_tokens=17)
"""Auxiliary terms as large as the loss, so that a mistake in one shows; a block that does not divide the tokens."""

SOURCES = 3

VISION = VisionConfig(
    image_size=8, patch_size=2, hidden_size=8, num_layers=2, num_heads=2, ffn_size=32, adapter_size=6, tiles_per_block=2
)

AUDIO = AudioConfig(
    mel_bins=5, window_frames=24, hidden_size=6, num_layers=2, num_heads=2, ffn_size=7, windows_per_block=2
)

TINY = ModelConfig(
    vocab_size=23,
    hidden_size=12,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    dense_ffn_size=10,
    expert_ffn_size=7,
    num_experts=4,
    moe_layer_step=2,
    nope_layer_step=4,
    chunk_size=5,
    rope_theta=100.0,
    temperature_floor=3.0,
    temperature_scale=0.7,
)
"""Small, and every feature that depends on a length takes effect within a dozen tokens."""


def random_params(config: ModelConfig, seed: int) -> oracle.Tree:
    """Weights of order one in every leaf, so that each detail of the model shows in the loss; float32 values."""

    def leaf(path: tuple[Any, ...], abstract: jax.ShapeDtypeStruct) -> np.ndarray:
        name, shape = path[-1].key, abstract.shape
        keys = "/".join(str(key.key) for key in path)
        normal = np.random.default_rng([seed, zlib.crc32(keys.encode())]).standard_normal(shape)
        if name.endswith("norm") or name == "scale":
            return 1 + 0.2 * normal
        if name == "bias":
            return 0.1 * normal
        if name in ("embed", "class_embed", "pos_embed"):
            return 0.7 * normal
        outputs = {"q": 2, "k": 2, "v": 2, "kernel": len(shape) - 2}.get(name, 1)
        inputs = {"o": (1, 2), "kernel": (1,)}.get(name, (len(shape) - outputs - 1,))
        if keys.endswith("o/kernel"):
            inputs = (1, 2)
        return normal * 1.2 / np.sqrt(np.prod([shape[i] for i in inputs]))

    values = jax.tree_util.tree_map_with_path(leaf, Skeleton(config).abstract_params)
    return jax.tree.map(lambda value: value.astype(np.float32), values)


def random_batch(
    config: ModelConfig,
    seed: int,
    rows: int = 2,
    length: int = 26,
    tiles: int = 2,
    longest: int = 12,
    windows: int = 5,
) -> dict[str, np.ndarray]:
    """Packed rows: several documents and, mostly, padding at the end; images and sound in some documents; uneven weights.

    Weights are powers of two, so that their sum is exact in any precision.
    """
    rng = np.random.default_rng([seed, 1])
    names = ("tokens", "targets", "segment_ids", "positions", "source_ids")
    batch: dict[str, np.ndarray] = {name: np.zeros((rows, length), np.int32) for name in names}
    batch["loss_weights"] = np.zeros((rows, length), np.float32)
    side, per_tile = (config.vision.image_size, config.vision.tokens_per_tile) if config.vision else (0, 0)
    if config.vision:
        batch["image_tiles"] = np.zeros((rows, tiles, side, side, 3), np.uint8)
        batch["image_positions"] = np.full((rows, tiles, per_tile), -1, np.int32)
    for b in range(rows):
        start, used, stop = 0, 0, length - int(rng.integers(0, 6))
        segment = 0
        while start < stop:
            size = min(int(rng.integers(1, longest + 1)), stop - start)
            where = slice(start, start + size)
            segment += 1
            batch["tokens"][b, where] = rng.integers(0, config.vocab_size, size)
            batch["segment_ids"][b, where] = segment
            batch["positions"][b, where] = np.arange(size)
            batch["source_ids"][b, where] = rng.integers(1, SOURCES + 1)
            batch["targets"][b, start : start + size - 1] = batch["tokens"][b, start + 1 : start + size]
            batch["loss_weights"][b, start : start + size - 1] = rng.choice([0, 0.25, 0.5, 1, 1, 2], size - 1)
            if config.vision and used < tiles and size > per_tile:
                first = start + int(rng.integers(0, size - per_tile + 1))
                batch["image_positions"][b, used] = np.arange(first, first + per_tile)
                batch["image_tiles"][b, used] = rng.integers(0, 256, (side, side, 3))
                used += 1
            start += size
    return batch | (_sound(config.audio, batch, windows, np.random.default_rng([seed, 4])) if config.audio else {})


def with_clip(config: ModelConfig, batch: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The batch with another first row, as a video makes it: three frames with the text of a time before each, and text;
    with an audio encoder, sound after the frames; then another document, with sound of its own.

    A batch of 26 tokens a row with three tiles, or more.
    """
    assert config.vision
    rng, P = np.random.default_rng([seed, 5]), config.vision.tokens_per_tile
    batch = {name: array.copy() for name, array in batch.items()}
    row = {name: array[0] for name, array in batch.items()}
    for array in row.values():
        array[...] = 0
    row["image_positions"][:] = -1
    frames = 3 * (1 + P)
    for start, stop, segment in ((0, frames + 4, 1), (frames + 4, len(row["tokens"]) - 2, 2)):
        where, size = slice(start, stop), stop - start
        row["tokens"][where] = rng.integers(0, config.vocab_size, size)
        row["segment_ids"][where], row["source_ids"][where] = segment, segment
        row["positions"][where] = np.arange(size)
        row["targets"][start : stop - 1] = row["tokens"][start + 1 : stop]
        row["loss_weights"][start : stop - 1] = rng.choice([0.25, 1, 2], size - 1)
    row["image_positions"][:3] = np.arange(frames).reshape(3, 1 + P)[:, 1:]
    row["image_tiles"][:3] = rng.integers(0, 256, row["image_tiles"][:3].shape)
    if config.audio:
        row["audio_positions"][:] = -1
        row["audio_positions"][1, :2] = frames + np.arange(1, 3)
        row["audio_positions"][3, :2] = frames + 4 + np.arange(2)
        row["audio_frames"][:] = rng.standard_normal(row["audio_frames"].shape)
    return batch


def _sound(
    audio: AudioConfig, batch: Mapping[str, np.ndarray], windows: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Windows of sound for a batch: in most documents one or two, where no image is; noise where nothing is used."""
    (B, S), P = batch["tokens"].shape, audio.tokens_per_window
    frames = rng.standard_normal((B, windows, audio.window_frames, audio.mel_bins)).astype(np.float32)
    positions = np.full((B, windows, P), -1, np.int32)
    for b in range(B):
        seen = batch["image_positions"][b] if "image_positions" in batch else []
        free, slots = np.setdiff1d(np.arange(S), seen), iter(rng.permutation(windows)[1:])
        for segment in range(1, batch["segment_ids"][b].max() + 1):
            places = free[batch["segment_ids"][b][free] == segment][rng.integers(0, 2) :]
            for count in rng.integers(1, P + 1, rng.integers(1, 3)):
                slot = next(slots, None)
                if slot is not None and len(places):
                    positions[b, slot, : len(places[:count])], places = places[:count], places[count:]
    return {"audio_frames": frames, "audio_positions": positions}


FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""These tests compile far longer than they compute; the programs are the same, their machine code is less polished."""


def shipped(config: ModelConfig, micro_batches: int = 1, with_gradient: bool = True) -> Callable[[Any, Any, Any], Any]:
    """The shipped objective, compiled: (params, router_bias, batch) -> (loss, sums, and with it the gradient)."""
    objective, skeleton = next_token_objective(COEFFICIENTS, SOURCES), Skeleton(config)

    def run(params: Any, router_bias: Any, batch: Any) -> Any:
        if with_gradient or micro_batches > 1:
            results = step.loss_and_gradient(skeleton, objective, params, router_bias, batch, micro_batches)
            return results if with_gradient else results[:2]
        return objective(skeleton.model(params, router_bias), batch, step.extras_for(batch, micro_batches))

    return jax.jit(run, compiler_options=FAST_COMPILE)


def expected(
    config: ModelConfig, params: Any, router_bias: Any, batch: Mapping[str, np.ndarray], micro_batches: int = 1
) -> tuple[float, dict[str, Any], oracle.Tree]:
    """The same of the oracle."""
    coefficients = COEFFICIENTS.load_balance_coef, COEFFICIENTS.router_z_coef
    bias = bias_of_layers(config, router_bias)
    return oracle.objective_and_gradient(params, batch, config, *coefficients, micro_batches, bias)


def random_bias(config: ModelConfig, seed: int) -> Any:
    """Biases of the expert selection in the layout of the training state; empty if the model has none."""
    if not config.router_bias_rate:
        return {}
    period = config.super_block()
    repeats = config.num_layers // len(period)
    rng = np.random.default_rng([seed, 2])
    drawn = rng.standard_normal((len(period), repeats, config.num_experts)).astype(np.float32)
    return {"blocks": {j: {"ffn": {"router_bias": drawn[j]}} for j, kind in enumerate(period) if kind.moe}}


def bias_of_layers(config: ModelConfig, router_bias: Any) -> dict[int, np.ndarray] | None:
    """The same, by layer."""
    if not router_bias:
        return None
    kinds, period = config.layer_kinds(), len(config.super_block())
    blocks = router_bias["blocks"]
    return {i: blocks[i % period]["ffn"]["router_bias"][i // period] for i, kind in enumerate(kinds) if kind.moe}


def assert_same_values(
    found: Mapping[str, Any], loss: Any, parts: Mapping[str, Any], total: float, tolerance: float
) -> None:
    """The objective's value and all that it reports."""
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    close(loss, total, err_msg="total")
    close(found["loss"], parts["loss"], err_msg="loss")
    for source in range(1, SOURCES + 1):
        nll, weight = parts["per_source"].get(source, (0.0, 0.0))
        close(found["source_loss"][source - 1], nll, err_msg=f"loss of source {source}")
        assert found["source_weight"][source - 1] == weight
    if parts["counts"]:
        for name in ("load_balance", "router_z"):
            close(found[name], parts[name], err_msg=name)
        np.testing.assert_array_equal(found["assignments"], list(parts["counts"].values()))


def assert_same_gradient(found: Any, expected: Any, tolerance: float) -> None:
    """Every leaf: the L2 norm of the difference, relative to that of the gradient."""
    total = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(expected)))

    def compare(path: Any, a: np.ndarray, b: np.ndarray) -> None:
        # A leaf whose gradient cancels to nothing is held to the noise of the others.
        limit = tolerance * max(np.linalg.norm(b), 1e-5 * total)
        error = np.linalg.norm(np.asarray(a, np.float64) - b)
        assert error <= limit, f"gradient of {jax.tree_util.keystr(path)}: off by {error}, limit {limit}"

    jax.tree_util.tree_map_with_path(compare, jax.device_get(found), expected)


def routing_margin(config: ModelConfig, params: Any, router_bias: Any, batch: Mapping[str, np.ndarray]) -> float:
    """Smallest gap between the last expert chosen and the first one not: noise below it cannot change a choice."""
    bias, k = bias_of_layers(config, router_bias), config.experts_per_token
    smallest = np.inf
    for _, _, document in oracle.documents(batch):
        stages = oracle.forward(oracle.as_float64(params), document, config, bias)
        for i, logits in stages.router_logits.items():
            preference = logits if bias is None else oracle.sigmoid(logits) + bias[i]
            ordered = -np.sort(-preference, axis=-1)
            if k < config.num_experts:
                smallest = min(smallest, (ordered[:, k - 1] - ordered[:, k]).min())
    return smallest
