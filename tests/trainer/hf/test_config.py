"""config.json: both spellings of transformers are read, what Drover does not do is refused, what is written reads back."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig, RopeScaling, VisionConfig
from sharding.errors import UserError
from trainer.hf.config import model_config_from_hf, model_config_to_hf, read_model_config
from trainer.hf.descriptions import ROLES

GOLDEN = Path(__file__).parents[2] / "golden"

SCOUT = {
    "model_type": "llama4",
    "image_token_index": 200092,
    "text_config": {
        "model_type": "llama4_text",
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": 4,
        "for_llm_compressor": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_qk_norm": True,
        "vocab_size": 202048,
    },
    "vision_config": {
        "model_type": "llama4_vision_model",
        "hidden_size": 1408,
        "image_size": 336,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 34,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "rope_theta": 10000,
        "vision_feature_layer": -1,
        "vision_output_dim": 4096,
    },
}
"""Scout's config.json as transformers 4 writes it, without the fields that change nothing."""


def changed(path: str, value: Any) -> dict[str, Any]:
    """Scout's config with one field changed."""
    config = copy.deepcopy(SCOUT)
    *sections, name = path.split(".")
    section: Any = config
    for key in sections:
        section = section[key]
    section[name] = value
    return config


def test_scout_is_the_default_model() -> None:
    assert model_config_from_hf(SCOUT) == ModelConfig(rope_scaling=RopeScaling(), vision=VisionConfig())


def test_both_spellings_of_the_rotary_embedding_are_read() -> None:
    text: dict[str, Any] = dict(SCOUT["text_config"])
    theta, scaling = text.pop("rope_theta"), text.pop("rope_scaling")
    newer = text | {"rope_parameters": scaling | {"rope_theta": theta}}
    assert model_config_from_hf(newer) == model_config_from_hf(SCOUT["text_config"])
    plain = text | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert model_config_from_hf(plain).rope_theta == 7.0
    assert model_config_from_hf(plain).rope_scaling is None


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("moe_layers", list(range(1, 48, 2)), {"moe_layer_step": 2, "moe_layers": None}),
    ("moe_layers", [], {"moe_layer_step": 0, "moe_layers": None}),
    ("moe_layers", [3, 5], {"moe_layer_step": 0, "moe_layers": (3, 5)}),
    ("interleave_moe_layer_step", 3, {"moe_layer_step": 3}),
    ("no_rope_layers", [1, 0] * 24, {"nope_layer_step": 2, "nope_layers": None}),
    ("no_rope_layers", [1] * 48, {"nope_layer_step": 0, "nope_layers": None}),
    ("no_rope_layers", [0] + [1] * 47, {"nope_layer_step": 0, "nope_layers": (0,)}),
    ("no_rope_layer_interval", 6, {"nope_layer_step": 6}),
    ("tie_word_embeddings", True, {"tie_embeddings": True}),
    ("attn_temperature_tuning", False, {"temperature_tuning": False}),
    ("head_dim", None, {"head_dim": 128}),
])  # fmt: skip
def test_patterns_and_switches_are_read(name: str, value: Any, expected: dict[str, Any]) -> None:
    model = model_config_from_hf(changed(f"text_config.{name}", value)["text_config"])
    assert {field: getattr(model, field) for field in expected} == expected


@pytest.mark.parametrize(("path", "value"), [
    ("model_type", "llama"),
    ("text_config", None),
    ("quantization_config", {"quant_method": "fp8"}),
    ("tie_word_embeddings", True),
    ("text_config.a_new_field", 1),
    ("text_config.hidden_act", "gelu"),
    ("text_config.attention_bias", True),
    ("text_config.attention_dropout", 0.1),
    ("text_config.attention_chunk_size", None),
    ("text_config.hidden_size", "5120"),
    ("text_config.num_hidden_layers", True),
    ("text_config.num_key_value_heads", 7),
    ("text_config.num_experts_per_tok", 17),
    ("text_config.moe_layers", [48]),
    ("text_config.no_rope_layers", [1, 0]),
    ("text_config.layer_types", ["full_attention"] * 48),
    ("text_config.rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("text_config.rope_scaling", {"rope_type": "llama3", "factor": 4.0}),
    ("text_config.rope_scaling", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ("text_config.rope_scaling", {"rope_type": "llama3", "factor": 0.5, "low_freq_factor": 1.0,
                                  "high_freq_factor": 2.0, "original_max_position_embeddings": 8}),
    ("text_config.rope_theta", float("nan")),
    ("vision_config.pixel_shuffle_ratio", 0.4),
    ("vision_config.intermediate_size", 100),
    ("vision_config.vision_output_dim", 100),
    ("vision_config.vision_feature_layer", -2),
    ("vision_config.projector_dropout", 0.1),
    ("vision_config.num_channels", 1),
    ("vision_config.image_size", 300),
    ("vision_config.rope_parameters", {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 2.0, "original_max_position_embeddings": 8}),
])  # fmt: skip
def test_what_drover_does_not_do_is_refused_by_the_name_of_the_field(path: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        model_config_from_hf(changed(path, value))
    named = {"num_key_value_heads": "num_kv_heads", "num_experts_per_tok": "experts_per_token"}
    last = path.rsplit(".", 1)[-1]
    assert named.get(last, last) in str(error.value)


def test_an_absent_section_is_said_to_be_missing() -> None:
    with pytest.raises(UserError, match="field text_config: it is missing"):
        model_config_from_hf({"model_type": "llama4"})


IDS = dict(zip(ROLES, range(200), strict=False))

ODD = ModelConfig(
    num_layers=5,
    moe_layers=(0, 3),
    nope_layers=(),
    head_dim=64,
    experts_per_token=2,
    qk_norm=False,
    temperature_tuning=False,
    tie_embeddings=True,
)


@pytest.mark.parametrize("model", [
    ModelConfig(),
    ModelConfig(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 4096), vision=VisionConfig(rope_theta=77.0)),
    ModelConfig(moe_layer_step=0, nope_layer_step=3),
    ODD,
    dataclasses.replace(ODD, vision=VisionConfig(image_size=84, patch_size=14, shuffle=3, ffn_size=1408 * 9)),
])  # fmt: skip
@pytest.mark.parametrize("spelling", ["both", "4", "5"])
def test_a_written_config_reads_back_in_each_spelling(model: ModelConfig, spelling: str) -> None:
    written = json.loads(json.dumps(model_config_to_hf(model, "bfloat16", IDS, 4096)))
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    for section in (written, written.get("text_config"), written.get("vision_config")):
        if section and spelling == "4":
            section.pop("rope_parameters", None)
        elif section and spelling == "5":
            section.pop("rope_theta", None)
            section.pop("rope_scaling", None)
    again = model_config_from_hf(written)
    assert again.layer_kinds() == model.layer_kinds()
    patterns = ("moe_layer_step", "moe_layers", "nope_layer_step", "nope_layers")
    same = {name: getattr(model, name) for name in patterns}
    assert dataclasses.replace(again, **same) == model


@pytest.mark.parametrize("name", ["text_scout", "text_interleaved", "text_maverick", "multimodal"])
def test_what_is_written_for_a_stored_model_says_what_transformers_wrote(name: str) -> None:
    stored = json.loads((GOLDEN / name / "config.json").read_text())
    text = stored.get("text_config", stored)
    ids = {"bos": text["bos_token_id"], "eos": text["eos_token_id"], "pad": text["pad_token_id"], "patch": 252}
    ids |= {"image_begin": 240, "image_end": 241}
    written = model_config_to_hf(model_config_from_hf(stored), "float32", ids, text["max_position_embeddings"])

    def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        for field, value in theirs.items():
            if isinstance(value, dict):
                compare(value, ours[field])
            elif field in ours:
                assert ours[field] == value, field
            else:  # nothing that decides the forward pass
                assert field in {
                    "initializer_range", "multi_modal_projector_bias", "norm_eps", "output_router_logits",
                    "router_aux_loss_coef", "router_jitter_noise", "transformers_version",
                    "vision_feature_select_strategy", "attention_dropout", "projector_dropout",
                }  # fmt: skip

    stored_uses_cache = {"use_cache": True}
    stored.update(stored_uses_cache if "text_config" not in stored else {})
    text.update(stored_uses_cache)
    compare(stored, written)


def test_a_floor_that_transformers_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.temperature_floor: found 2\.5, expected a whole number"):
        model_config_to_hf(ModelConfig(temperature_floor=2.5), "float32", IDS, 64)


@pytest.mark.parametrize(("changes", "named"), [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, "rope_scaling"),
    ({"rope_theta": 7.0}, "rope_theta"),
    ({"rope_scaling": {**SCOUT["text_config"]["rope_scaling"], "factor": 8.0}}, "rope_scaling"),
])  # fmt: skip
def test_two_spellings_that_disagree_are_refused(changes: dict[str, Any], named: str) -> None:
    text: dict[str, Any] = dict(SCOUT["text_config"])
    both = text | {"rope_parameters": text["rope_scaling"] | {"rope_theta": text["rope_theta"]}}
    assert model_config_from_hf(both) == model_config_from_hf(text)
    with pytest.raises(UserError, match=f"field {named}: found"):
        model_config_from_hf(both | changes)


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json: not found"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match=rf"{tmp_path}: config.json, field model_type: found 'gpt2'"):
        read_model_config(tmp_path)
