"""What stands beside the weights in a Hugging Face directory: config, tokenizer, processors, generation.

The fields are those that transformers 4.57 and 5.23 read; where the two differ, both find what they look for.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.chat import CHAT_TEMPLATE, HEADER_END, HEADER_START, TURN_END
from data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, IMAGE, IMAGE_END, IMAGE_START, PAD, PATCH, Tokenizer
from model.config import VisionConfig
from sharding.errors import UserError
from trainer.config import RunConfig
from trainer.hf.config import model_config_to_hf
from trainer.hf.files import read_json

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"

_FIXED = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
}
"""Fields of the image processor that have one value here."""
_DEFAULT_MAX_TILES = 16

ROLES = {
    "bos": BEGIN_OF_TEXT,
    "eos": END_OF_TEXT,
    "pad": PAD,
    "image_begin": IMAGE_START,
    "image_end": IMAGE_END,
    "patch": PATCH,
}
"""Special tokens that config.json names by their ids."""


def image_options(directory: Path, vision: VisionConfig) -> dict[str, Any]:
    """Options of `DataConfig` for images, from a directory's processor files; Llama 4's own without such files.

    Raises:
        UserError: the files ask for something that Drover's preprocessing does not do.
    """
    nested = read_json(directory / PROCESSOR).get("image_processor") if (directory / PROCESSOR).is_file() else None
    path = directory / (PROCESSOR if nested else PREPROCESSOR)
    options = nested or (read_json(path) if path.is_file() else {})
    size = options.get("size") or {"height": vision.image_size, "width": vision.image_size}
    expected = {**_FIXED, "size": {"height": vision.image_size, "width": vision.image_size}}
    for name, value in {**options, "size": size}.items():
        if name in expected and value is not None and value != expected[name]:
            raise UserError(
                f"{path}, field {name}: found {value!r}, expected {expected[name]!r}: Drover does no other."
            )
    return {
        "max_tiles": options.get("max_patches", _DEFAULT_MAX_TILES),
        "resize_to_max_canvas": options.get("resize_to_max_canvas", False),
    }


def write_descriptions(
    directory: Path, run: RunConfig, tokenizer: Tokenizer | None, dtype: str, told: Callable[[str], None]
) -> None:
    """Writes all of it for a model of ours, into an existing directory.

    Args:
        directory: where to.
        run: the model, and how its data cuts images.
        tokenizer: None if it is not known; the directory then has no tokenizer files.
        dtype: precision of the weights.
        told: called with a line about each file that cannot be written.
    """
    ids: dict[str, int | None] = dict.fromkeys(ROLES)
    length = run.data.sequence_length
    if tokenizer:
        ids = {role: tokenizer.special.get(name) for role, name in ROLES.items()}
        _write_tokenizer(directory, tokenizer, length, run.model.vision is not None)
        chat = [tokenizer.special[name] for name in (TURN_END,) if name in tokenizer.special]
        generation = {"bos_token_id": ids["bos"], "eos_token_id": [ids["eos"], *chat], "pad_token_id": ids["pad"]}
        _write(directory / "generation_config.json", generation)
    else:
        told("the checkpoint knows no tokenizer: no tokenizer files were written, and config.json names no token ids")
    _write(directory / "config.json", model_config_to_hf(run.model, dtype, ids, length))
    if run.model.vision:
        _write_processor(directory, run, run.model.vision)


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, length: int, images: bool) -> None:
    content = json.loads(tokenizer.serialised)
    content["decoder"] = content.get("decoder") or {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    content["post_processor"] = content.get("post_processor") or _begin_with(tokenizer.special[BEGIN_OF_TEXT])
    _write(directory / "tokenizer.json", content)
    named = {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PAD}
    _write(directory / "special_tokens_map.json", named)
    options = {
        **named,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": length,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write(directory / "tokenizer_config.json", options | ({"processor_class": "Llama4Processor"} if images else {}))
    if all(name in tokenizer.special for name in (HEADER_START, HEADER_END, TURN_END)):
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _begin_with(token: int) -> dict[str, Any]:
    """A post-processor that puts begin-of-text before a text, as documents here begin."""
    first = {"SpecialToken": {"id": BEGIN_OF_TEXT, "type_id": 0}}
    second = {"SpecialToken": {"id": BEGIN_OF_TEXT, "type_id": 1}}
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    special = {BEGIN_OF_TEXT: {"id": BEGIN_OF_TEXT, "ids": [token], "tokens": [BEGIN_OF_TEXT]}}
    return {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, second, b],
        "special_tokens": special,
    }


def _write_processor(directory: Path, run: RunConfig, vision: VisionConfig) -> None:
    processor = {
        "fake_image_token": IMAGE,
        "image_token": IMAGE,
        "patch_size": vision.patch_size,
        "pixel_shuffle_ratio": 1 / vision.shuffle,
        "processor_class": "Llama4Processor",
    }
    images = {
        **_FIXED,
        "image_processor_type": "Llama4ImageProcessorFast",
        "max_patches": run.data.max_tiles,
        "processor_class": "Llama4Processor",
        "rescale_factor": 1 / 255,
        "resize_to_max_canvas": run.data.resize_to_max_canvas,
        "size": {"height": vision.image_size, "width": vision.image_size},
    }
    _write(directory / PROCESSOR, processor)
    _write(directory / PREPROCESSOR, images)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
