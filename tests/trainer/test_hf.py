"""Hugging Face checkpoints: the bijection, the configs of both transformers spellings, and what is refused."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from model.config import ModelConfig, RopeScaling, VisionConfig
from sharding.errors import UserError
from trainer import hf
from trainer.hf_config import model_config_from_hf
from trainer.step import Skeleton

GOLDEN = Path(__file__).parent.parent / "golden"
MODELS = ("text_scout", "text_interleaved", "text_maverick", "multimodal")

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


def golden(name: str) -> tuple[Path, ModelConfig]:
    directory = GOLDEN / name
    return directory, model_config_from_hf(json.loads((directory / "config.json").read_text()))


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    header, data, offset = {}, [], 0
    for name, tensor in tensors.items():
        data.append(tensor.tobytes())
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


# The bijection


@pytest.mark.parametrize("name", MODELS)
def test_the_table_covers_every_parameter_of_the_model_and_every_tensor_of_the_checkpoint(name: str) -> None:
    directory, model = golden(name)
    params = hf.load_pretrained(directory, model)
    abstract = Skeleton(model).abstract_params
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    tensors, again = hf.read_safetensors(directory), hf.to_hf(params, model)
    assert again.keys() == tensors.keys()
    for tensor in tensors:
        np.testing.assert_array_equal(again[tensor], tensors[tensor], err_msg=tensor)


def test_tied_embeddings_have_no_tensor_of_their_own() -> None:
    directory, model = golden("text_scout")
    tensors = hf.read_safetensors(directory)
    del tensors["lm_head.weight"]
    assert "lm_head" not in hf.from_hf(tensors, dataclasses.replace(model, tie_embeddings=True))


def test_bfloat16_weights_are_read_exactly(tmp_path: Path) -> None:
    directory, model = golden("text_maverick")
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in hf.read_safetensors(directory).items()}
    shutil.copy(directory / "config.json", tmp_path)
    write_safetensors(tmp_path / "model.safetensors", rounded, "BF16")
    for dtype, expected in (("float32", np.float32), ("float64", np.float64)):
        params = hf.load_pretrained(tmp_path, dataclasses.replace(model, param_dtype=dtype))
        assert params["lm_head"].dtype == expected
        np.testing.assert_array_equal(params["lm_head"].T, rounded["lm_head.weight"].astype(expected))


def sharded(directory: Path, source: Path) -> None:
    tensors = hf.read_safetensors(source)
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        write_safetensors(directory / shard, {n: tensors[n] for n in names if weight_map[n] == shard}, "F32")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(source / "config.json", directory)


def test_shards_are_the_same_as_one_file(tmp_path: Path) -> None:
    directory, model = golden("multimodal")
    sharded(tmp_path, directory)
    jax.tree.map(
        np.testing.assert_array_equal, hf.load_pretrained(tmp_path, model), hf.load_pretrained(directory, model)
    )


# Damaged, incomplete and refused


def test_every_missing_left_over_and_misshapen_tensor_is_listed() -> None:
    directory, model = golden("text_scout")
    tensors = hf.read_safetensors(directory)
    del tensors["model.norm.weight"]
    tensors["model.layers.9.odd"] = np.zeros((2, 3), np.float32)
    tensors["lm_head.weight"] = np.zeros((7, 64), np.float32)
    with pytest.raises(UserError) as error:
        hf.from_hf(tensors, model)
    message = str(error.value)
    assert "missing model.norm.weight [64]" in message
    assert "left over model.layers.9.odd [2, 3]" in message
    assert "lm_head.weight: found shape [7, 64], expected [256, 64]" in message


def test_a_config_that_describes_another_model_is_refused() -> None:
    directory, model = golden("text_scout")
    with pytest.raises(UserError, match=r"model.chunk_size: found 99, expected 16"):
        hf.load_pretrained(directory, dataclasses.replace(model, chunk_size=99))
    # How it is computed is not what it is.
    hf.load_pretrained(directory, dataclasses.replace(model, remat="full", dtype="bfloat16", init_std=1.0))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory, model = golden("text_scout")
    sharded(tmp_path, directory)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors, which is not in the directory"):
        hf.load_pretrained(tmp_path, model)


def test_pickles_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickles: loading one runs"):
        hf.read_safetensors(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 200, -4])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    data = (GOLDEN / "text_scout" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:kept])
    with pytest.raises(UserError, match="Fetch the file again"):
        hf.read_safetensors(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no directory"):
        hf.read_safetensors(tmp_path / "absent")
    with pytest.raises(UserError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        hf.read_safetensors(tmp_path)
    directory, model = golden("text_scout")
    shutil.copy(directory / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match=r"has no config.json"):
        hf.load_pretrained(tmp_path, model)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(4, np.int8)}, "F8_E4M3")
    with pytest.raises(UserError, match="found F8_E4M3"):
        hf.read_safetensors(tmp_path)


# config.json


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
