"""A Hugging Face Llama 4 `config.json` as a `ModelConfig` (transformers 4.51 to 5, text-only or multimodal), and back."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import ModelConfig, RopeScaling, VisionConfig
from sharding.errors import UserError
from trainer.hf.files import read_json
from trainer.sections import from_plain, to_plain

# fmt: off
_COMMON = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures", "attn_implementation",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cache_implementation", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder",
    "label2id", "length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "prefix", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})
# fmt: on
"""Fields that every Hugging Face configuration may have and that change nothing in the forward pass of Llama 4."""

_UNREAD = {
    "text": _COMMON
    | {
        "for_llm_compressor",
        "max_position_embeddings",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
    },
    "vision": _COMMON
    | {
        "hidden_act",
        "initializer_range",
        "multi_modal_projector_bias",
        "norm_eps",
        "tie_word_embeddings",
        "vision_feature_select_strategy",
    },
    "model": _COMMON | {"boi_token_index", "eoi_token_index", "image_token_index"},
}
"""Fields of each section that transformers' Llama 4 does not read in its forward pass."""


class _Fields:
    """One section of a config.json, which remembers what was read so that what was not is never lost in silence."""

    def __init__(self, values: Mapping[str, Any], section: str, prefix: str = ""):
        self.values, self.section, self.prefix = values, section, prefix
        self.read: set[str] = set()

    def fail(self, name: str, expected: str) -> UserError:
        found = f"found {self.values[name]!r}" if name in self.values else "it is missing"
        return UserError(f"config.json, field {self.prefix}{name}: {found}, expected {expected}.")

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, minimum: int = 1) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.fail(name, f"a whole number, {minimum} or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(name, "a number")
        return float(value)

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """The field, where given, has one of these values: Drover's model has no other way."""
        if self.get(name, allowed[0]) not in allowed:
            raise self.fail(name, f"{' or '.join(map(repr, allowed))}: {why}")

    def layers(self, name: str, count: int) -> list[int] | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            raise self.fail(name, "a list of whole numbers")
        if any(not 0 <= i < count for i in value):
            raise self.fail(name, f"numbers from 0 to {count - 1}")
        return value

    def done(self) -> None:
        for name, value in self.values.items():
            if name not in self.read and name not in _UNREAD[self.section] and value is not None:
                raise UserError(
                    f"config.json, field {self.prefix}{name}: found {value!r}, a field that Drover does not know for "
                    "Llama 4. If it does not change what the model computes, remove it from the file and start again."
                )


def model_config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a Llama 4 `config.json` (as a dict) describes, text-only or multimodal.

    Both spellings of the rotary embedding are read: `rope_theta` + `rope_scaling` (transformers 4) and
    `rope_parameters` (transformers 5). Options that have no counterpart there (remat, kernels, precision of the
    weights) keep Drover's defaults.

    Raises:
        UserError: a field is missing, malformed, unknown, or asks for something that Drover's model does not do.
    """
    model = _unchecked(config)
    return from_plain(ModelConfig, to_plain(model), "the model that config.json describes")


def read_model_config(directory: Path) -> ModelConfig:
    """The model that a directory's config.json describes; raises `UserError` that names the file."""
    path = directory.expanduser() / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the config.json of a Hugging Face Llama 4 model.")
    try:
        return model_config_from_hf(read_json(path))
    except UserError as error:
        raise UserError(f"{path.parent}: {error}") from error


def _unchecked(config: Mapping[str, Any]) -> ModelConfig:
    """The model that the file's fields describe; the options' own rules are not yet looked at."""
    kind = config.get("model_type")
    if kind == "llama4_text":
        return _text_config(config, "")
    if kind != "llama4":
        raise UserError(f"config.json, field model_type: found {kind!r}, expected 'llama4' or 'llama4_text'.")
    fields = _Fields(config, "model")
    text, vision = fields.get("text_config"), fields.get("vision_config")
    for name, section in (("text_config", text), ("vision_config", vision)):
        if not isinstance(section, Mapping):
            raise fields.fail(name, "a section of fields")
    model = _text_config(text, "text_config.", vision=_vision_config(vision))
    # The option exists on both levels; a file whose levels disagree is not guessed at.
    fields.only("tie_word_embeddings", model.tie_embeddings, why="the same as text_config.tie_word_embeddings")
    fields.done()
    return model


def _text_config(values: Mapping[str, Any], prefix: str, vision: VisionConfig | None = None) -> ModelConfig:
    fields = _Fields(values, "text", prefix)
    count, hidden, heads = (fields.integer(n) for n in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    fields.only("hidden_act", "silu", why="Drover's feed-forward layers are SwiGLU")
    fields.only("attention_bias", False, why="Drover's decoder has no biases")
    fields.only("attention_dropout", 0.0, 0, why="Drover has no dropout")
    if fields.get("quantization_config") is not None:
        raise fields.fail("quantization_config", "none: Drover reads weights that are not quantised")

    moe = fields.layers("moe_layers", count)
    if moe is None:
        step = fields.integer("interleave_moe_layer_step")
        moe = list(range(step - 1, count, step))
    else:
        fields.get("interleave_moe_layer_step")
    # 1 means that the layer does use the rotary embedding; an empty list means the interval.
    rope = fields.layers("no_rope_layers", 2)
    if rope:
        fields.get("no_rope_layer_interval")
        if len(rope) != count:
            raise fields.fail("no_rope_layers", f"one number per layer, {count} of them")
    else:
        given = fields.get("no_rope_layer_interval") is not None
        interval = fields.integer("no_rope_layer_interval") if given else 4
        rope = [int((i + 1) % interval != 0) for i in range(count)]
    types = ["chunked_attention" if uses else "full_attention" for uses in rope]
    if fields.get("layer_types", types) != types:
        raise fields.fail("layer_types", "chunked_attention where no_rope_layers is 1 and full_attention where it is 0")
    moe_step, moe_layers = _step_or_list(moe, count)
    nope_step, nope_layers = _step_or_list([i for i, uses in enumerate(rope) if not uses], count)

    theta, scaling = _rope(fields, 500000.0)
    temperature = fields.get("attn_temperature_tuning", True)
    if not isinstance(temperature, bool | int):  # early files have the integer 4, which transformers took as true
        raise fields.fail("attn_temperature_tuning", "true or false")
    model = ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=count,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim") if fields.get("head_dim") is not None else hidden // heads,
        dense_ffn_size=fields.integer("intermediate_size_mlp"),
        expert_ffn_size=fields.integer("intermediate_size"),
        num_experts=fields.integer("num_local_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        moe_layer_step=moe_step,
        moe_layers=moe_layers,
        nope_layer_step=nope_step,
        nope_layers=nope_layers,
        chunk_size=fields.integer("attention_chunk_size"),
        qk_norm=bool(fields.get("use_qk_norm", True)),
        rope_theta=theta,
        rope_scaling=scaling,
        temperature_tuning=bool(temperature),
        temperature_floor=fields.number("floor_scale", 8192),
        temperature_scale=fields.number("attn_scale", 0.1),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        init_std=fields.number("initializer_range", 0.02),
        vision=vision,
    )
    fields.done()
    return model


def _vision_config(values: Mapping[str, Any]) -> VisionConfig:
    fields = _Fields(values, "vision", "vision_config.")
    fields.only("num_channels", 3, why="images are RGB")
    fields.only("vision_feature_layer", -1, why="Drover reads the last layer of the vision encoder")
    for name in ("attention_dropout", "projector_dropout"):
        fields.only(name, 0.0, 0, why="Drover has no dropout")
    ratio = fields.number("pixel_shuffle_ratio", 0.5)
    shuffle = round(1 / ratio) if ratio > 0 else 0
    if shuffle < 1 or not math.isclose(shuffle * ratio, 1.0):
        raise fields.fail("pixel_shuffle_ratio", "one over a whole number, such as 0.5")
    hidden, ffn = fields.integer("hidden_size"), fields.integer("intermediate_size")
    if ffn != hidden * shuffle**2:
        raise fields.fail("intermediate_size", f"hidden_size / pixel_shuffle_ratio^2 = {hidden * shuffle**2}")
    adapter = fields.integer("projector_output_dim")
    for name in ("projector_input_dim", "vision_output_dim"):
        if fields.integer(name) != adapter:
            raise fields.fail(name, f"the same as projector_output_dim, {adapter}")
    theta, scaling = _rope(fields, 10000.0)
    if scaling is not None:
        raise fields.fail("rope_parameters", "no scaling in the vision encoder")
    vision = VisionConfig(
        image_size=fields.integer("image_size"),
        patch_size=fields.integer("patch_size"),
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=fields.integer("num_attention_heads"),
        ffn_size=ffn,
        shuffle=shuffle,
        adapter_size=adapter,
        rope_theta=theta,
    )
    fields.done()
    return vision


def _rope(fields: _Fields, default_theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from `rope_parameters`, or from `rope_theta` and `rope_scaling`.

    A file for every version of transformers has both; they must then say the same.
    """
    spellings = [name for name in ("rope_parameters", "rope_scaling") if fields.get(name) is not None]
    theta = fields.number("rope_theta", default_theta)
    if not spellings:
        return theta, None
    found = {name: _rope_section(fields, name, theta) for name in spellings}
    first = found[spellings[0]]
    if fields.get("rope_theta") is not None and theta != first[0]:
        raise fields.fail("rope_theta", f"{first[0]}, as in {fields.prefix}{spellings[0]}")
    for name, value in found.items():
        if value != first:
            raise fields.fail(name, f"the same as {fields.prefix}{spellings[0]}")
    return first


def _rope_section(fields: _Fields, name: str, default_theta: float) -> tuple[float, RopeScaling | None]:
    rope = fields.get(name)
    if not isinstance(rope, Mapping):
        raise fields.fail(name, "a section of fields")
    inner = _Fields(rope, "text", f"{fields.prefix}{name}.")
    theta = inner.number("rope_theta", default_theta)
    kind = inner.get("rope_type", inner.get("type", "default"))
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=inner.number("factor"),
            low_freq_factor=inner.number("low_freq_factor"),
            high_freq_factor=inner.number("high_freq_factor"),
            original_length=inner.integer("original_max_position_embeddings"),
        )
    elif kind != "default":
        raise inner.fail("rope_type" if "rope_type" in rope else "type", "'default' or 'llama3'")
    inner.get("type")
    inner.done()
    return theta, scaling


def _step_or_list(layers: list[int], count: int) -> tuple[int, tuple[int, ...] | None]:
    """The pattern as (step, None) if it is every so many layers, as the releases have it, else (0, the layers)."""
    if not layers:
        return 0, None
    step = min(layers) + 1
    return (step, None) if sorted(layers) == list(range(step - 1, count, step)) else (0, tuple(sorted(layers)))


def model_config_to_hf(
    model: ModelConfig, dtype: str, ids: Mapping[str, int | None], max_length: int
) -> dict[str, Any]:
    """The `config.json` of a model, the inverse of `model_config_from_hf`.

    Transformers 5 spells the rotary embedding and the precision in another way than 4, and 4 reads neither of the newer
    names nor complains: both spellings are written.

    Args:
        model: text-only or multimodal.
        dtype: of the stored weights: float32, bfloat16, float16 or float64.
        ids: token ids by role: bos, eos, pad, and for images begin (of image), end, patch; None where there is none.
        max_length: tokens that a sequence may have, `max_position_embeddings`.
    """
    text = _text_to_hf(model, dtype, ids, max_length)
    if model.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "boi_token_index": ids["image_begin"],
        "eoi_token_index": ids["image_end"],
        "image_token_index": ids["patch"],
        **_dtype(dtype),
        "tie_word_embeddings": model.tie_embeddings,
        "text_config": text,
        "vision_config": _vision_to_hf(model.vision, dtype),
    }


def _text_to_hf(model: ModelConfig, dtype: str, ids: Mapping[str, int | None], max_length: int) -> dict[str, Any]:
    kinds = model.layer_kinds()
    scaling = model.rope_scaling
    scaled = None
    if scaling:
        scaled = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return {
        "model_type": "llama4_text",
        **_dtype(dtype),
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.expert_ffn_size,
        "intermediate_size_mlp": model.dense_ffn_size,
        "hidden_act": "silu",
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        "interleave_moe_layer_step": model.moe_layer_step or 1,
        "moe_layers": [i for i, kind in enumerate(kinds) if kind.moe],
        "no_rope_layer_interval": model.nope_layer_step or 4,
        "no_rope_layers": [int(kind.rope) for kind in kinds],
        "layer_types": ["chunked_attention" if kind.rope else "full_attention" for kind in kinds],
        "attention_chunk_size": model.chunk_size,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_qk_norm": model.qk_norm,
        **_rope_to_hf(model.rope_theta, scaled),
        "attn_temperature_tuning": model.temperature_tuning,
        "floor_scale": _whole(model.temperature_floor),
        "attn_scale": model.temperature_scale,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std or 0.02,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }


def _whole(floor: float) -> int:
    if not floor.is_integer():
        raise UserError(
            f"model.temperature_floor: found {floor}, expected a whole number: transformers takes no other."
        )
    return int(floor)


def _vision_to_hf(vision: VisionConfig, dtype: str) -> dict[str, Any]:
    return {
        "model_type": "llama4_vision_model",
        **_dtype(dtype),
        "hidden_size": vision.hidden_size,
        "hidden_act": "gelu",
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "intermediate_size": vision.ffn_size,
        "pixel_shuffle_ratio": 1 / vision.shuffle,
        "projector_input_dim": vision.adapter_size,
        "projector_output_dim": vision.adapter_size,
        "vision_output_dim": vision.adapter_size,
        **_rope_to_hf(vision.rope_theta, None),
    }


def _dtype(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "torch_dtype": dtype}


def _rope_to_hf(theta: float, scaling: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    }
