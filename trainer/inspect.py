"""The numbers of a model, before anybody pays for it: parameters by part, FLOPs, decoding cache, memory.

Parameters are counted from the shapes of the model that is trained (`jax.eval_shape`, no array is made), FLOPs by the
formulas of `trainer/flops.py`. The tests hold both to the published sizes of the Llama 4 family.
"""

import io
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import IO, Any, NamedTuple

import jax
from rich import box
from rich.console import Console as Terminal
from rich.table import Table
from rich.text import Text

from model.config import ModelConfig
from trainer.flops import FlopsPerToken, ParameterCounts, flops_per_token
from trainer.report_text import compact, percent
from trainer.step import weight_shapes

LENGTHS = (1024, 8192, 32_768, 131_072, 1_048_576, 10_485_760)
"""Documents whose cost is listed, in tokens; the last is the longest that a released model, Scout, was made for."""

CACHE_BYTES = 2
"""Bytes of a cached key or value: bfloat16."""

QUANTISED = ("routed_experts", "shared_experts", "dense_ffn", "attention")
"""Parts that servers quantise; router, norms, embedding, head and encoders usually stay as they are."""

MEDIA_PARTS = ("vision", "projector", "audio", "audio_projector")
"""Parts that text does not use."""

GROUP = 128
"""Quantised weights that share one bfloat16 scale."""

WIDTH = 100


class Device(NamedTuple):
    """An accelerator to measure memory against."""

    name: str
    memory_bytes: float
    source: str


DEVICES = (
    Device("H100 80 GB", 80e9, "NVIDIA data sheet"),
    Device("H200 141 GB", 141e9, "NVIDIA data sheet"),
    Device("TPU v5p 95 GB", 95e9, "Google Cloud TPU documentation"),
)


# Counting


def part_of(path: tuple[str | int, ...]) -> str:
    """The field of `ParameterCounts` that a weight at this path of the parameter tree counts for.

    Raises:
        ValueError: no part knows the path. The model has a weight that this table was not told of.
    """
    match path:
        case ("embed",):
            return "embedding"
        case ("lm_head",):
            return "head"
        case ("final_norm",) | ("blocks", int(), "attn_norm" | "ffn_norm"):
            return "norms"
        case ("blocks", int(), "attn", "q" | "k" | "v" | "o"):
            return "attention"
        case ("blocks", int(), "ffn", "gate" | "up" | "down"):
            return "dense_ffn"
        case ("blocks", int(), "ffn", "router"):
            return "router"
        case ("blocks", int(), "ffn", "experts", "gate" | "up" | "down"):
            return "routed_experts"
        case ("blocks", int(), "ffn", "shared", "gate" | "up" | "down"):
            return "shared_experts"
        case ("vision", *_):
            return "vision"
        case ("projector",):
            return "projector"
        case ("audio", *_):
            return "audio"
        case ("audio_projector",):
            return "audio_projector"
    raise ValueError(f"the weight {'.'.join(map(str, path))} belongs to no part of the model that is counted")


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Counts by part, from the shapes of the model itself; every weight is in exactly one part."""
    # Neither the platform nor the precision changes a shape: so no device is asked for, and jax has nothing to warn of.
    shapes = weight_shapes(replace(model, param_dtype="float32"))
    parts = Counter({field.name: 0 for field in fields(ParameterCounts)})
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        parts[part_of(tuple(step.key for step in path))] += math.prod(leaf.shape)
    text = sum(count for name, count in parts.items() if name not in MEDIA_PARTS)
    visited = parts["routed_experts"] // model.num_experts * model.experts_per_token
    parts["active"] = text - parts["routed_experts"] + visited
    return ParameterCounts(**parts)


def inspect_model(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """All that `render` shows, as plain values: counts, FLOPs and bytes, without units or rounding.

    Args:
        model: checked options.
        sequence_length: tokens of a training row; FLOPs by part are those of a document of this length.
    """
    counts = count_parameters(model)
    return {
        "model": _shape(model),
        "parameters": asdict(counts) | {"text": counts.text, "total": counts.total},
        "flops": _flops(model, sequence_length),
        "kv_cache": _kv_cache(model, sequence_length),
        "memory": _memory(model, counts),
    }


def _shape(model: ModelConfig) -> dict[str, Any]:
    kinds, vision, audio = model.layer_kinds(), model.vision, model.audio
    shape = {
        "layers": len(kinds),
        "moe_layers": sum(kind.moe for kind in kinds),
        "rope_layers": sum(kind.rope for kind in kinds),
        "hidden_size": model.hidden_size,
        "experts": model.num_experts,
        "experts_per_token": model.experts_per_token,
        "chunk_size": model.chunk_size,
        "vision": None,
        "audio": None,
    }
    if vision:
        shape["vision"] = {
            "layers": vision.num_layers,
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "tokens_per_tile": vision.tokens_per_tile,
        }
    if audio:
        shape["audio"] = {
            "layers": audio.num_layers,
            "hidden_size": audio.hidden_size,
            "window_frames": audio.window_frames,
            "tokens_per_window": audio.tokens_per_window,
        }
    return shape


def _flops(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    flops = flops_per_token(model, sequence_length)
    parts = asdict(flops)
    tile, window = parts.pop("vision_per_tile"), parts.pop("audio_per_window")
    return {
        "sequence_length": sequence_length,
        "forward": parts | {"total": flops.forward},
        "training": flops.training,
        "formula": _formula(model, flops),
        "image_tile": {"forward": tile, "training": flops.training_per_tile} if model.vision else None,
        "audio_window": {"forward": window, "training": flops.training_per_window} if model.audio else None,
        "by_length": [
            {
                "tokens": length,
                "forward": at.forward,
                "training": at.training,
                "attention_scores": at.attention_scores,
            }
            for length in _lengths(sequence_length)
            for at in (flops_per_token(model, length),)
        ],
    }


def _formula(model: ModelConfig, flops: FlopsPerToken) -> str:
    """Where the FLOPs of a token come from, with the numbers put in."""
    weights = (flops.forward - flops.attention_scores) / 2
    context = flops.attention_scores / (4 * model.num_heads * model.head_dim)
    return (
        f"forward = 2 x {weights:,.0f} weights that the token meets (not the embedding table, nor experts that it does "
        f"not visit) + 4 x {model.num_heads} heads x {model.head_dim} x {context:,.1f} positions "
        "(mean causal context, summed over the layers). training = 3 x forward: no recomputation, no padding."
    )


def _kv_cache(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    layers = len(model.layer_kinds())
    growing = sum(not kind.rope for kind in model.layer_kinds())
    token = model.cache_bytes(1, CACHE_BYTES)
    return {
        "dtype": "bfloat16",
        "bytes_per_token_and_layer": token // layers,
        "bytes_per_token": token,
        "bytes_per_token_beyond_a_chunk": token // layers * growing,
        "by_length": [
            {"tokens": length, "bytes": model.cache_bytes(length, CACHE_BYTES), "bytes_unchunked": token * length}
            for length in _lengths(sequence_length)
        ],
    }


def _memory(model: ModelConfig, counts: ParameterCounts) -> dict[str, Any]:
    """Bytes of weights and of training state. Activations, caches and images come on top, and are not estimated."""
    quantised = sum(getattr(counts, part) for part in QUANTISED)
    scales = 2 * -(-quantised // GROUP)
    kept = 2 * (counts.total - quantised)
    matrices = f"attention, MLPs and experts, with a bfloat16 scale for every {GROUP} weights; the rest is bfloat16"
    wide = 8 if model.param_dtype == "float64" else 4
    rows = [
        ("float32", 4 * counts.total, "all weights"),
        ("bfloat16", 2 * counts.total, "all weights"),
        ("int8", quantised + scales + kept, matrices),
        ("int4", -(-quantised // 2) + scales + kept, matrices),
        (
            "training",
            4 * wide * counts.total,
            f"{model.param_dtype} weights, gradients and two moments, as drover trains",
        ),
        (
            "training_mixed",
            16 * counts.total,
            "bfloat16 weights and gradients, float32 weights and two moments elsewhere",
        ),
    ]
    return {
        "devices": [device._asdict() for device in DEVICES],
        "rows": [
            {
                "name": name,
                "bytes": size,
                "holds": holds,
                "devices": {device.name: math.ceil(size / device.memory_bytes) for device in DEVICES},
            }
            for name, size, holds in rows
        ],
    }


def _lengths(sequence_length: int) -> list[int]:
    return sorted({sequence_length, *LENGTHS})


# Showing


PARTS = (
    ("routed_experts", "routed experts"),
    ("shared_experts", "shared experts"),
    ("dense_ffn", "dense MLPs"),
    ("attention", "attention"),
    ("router", "router"),
    ("embedding", "embedding"),
    ("head", "output head"),
    ("norms", "norms"),
    ("text", "text"),
    ("vision", "vision encoder"),
    ("projector", "projector"),
    ("audio", "audio encoder"),
    ("audio_projector", "audio projector"),
    ("total", "total"),
)
"""Rows of the first table: keys of the facts, and how they are called."""


def show(facts: Mapping[str, Any], title: str, file: IO[str] | None = None) -> None:
    """Prints what `inspect_model` found, in at most 100 columns; without control codes where `file` is no terminal.

    Args:
        facts: of `inspect_model`.
        title: name of the model.
        file: where to; the standard output if None.
    """
    out = terminal(file)
    out.print(Text.assemble((title, "bold"), f": {_sentence(facts['model'])}"))
    for table, notes in (
        (_parts_table(facts), _parts_notes(facts)),
        (_length_table(facts), _length_notes(facts)),
        (_memory_table(facts), _memory_notes(facts["memory"])),
    ):
        out.print()
        out.print(table)
        for note in notes:
            out.print(Text(note, style="dim"))


def terminal(file: IO[str] | None) -> Terminal:
    """Not as wide as the terminal: wrapped lines are easier to read than cut columns."""
    return Terminal(file=file, width=WIDTH, highlight=False, markup=False, emoji=False)


def render(facts: Mapping[str, Any], title: str) -> str:
    """What `show` prints, as plain text."""
    file = io.StringIO()
    show(facts, title, file)
    return file.getvalue()


def _sentence(model: Mapping[str, Any]) -> str:
    """The shape of the model in words."""
    layers, moe, rope = model["layers"], model["moe_layers"], model["rope_layers"]
    kinds = (
        [f"{moe if moe < layers else 'all'} with {model['experts']} experts (top {model['experts_per_token']})"]
        if moe
        else []
    )
    kinds += [f"{layers - moe} dense"] if moe < layers else []
    attention = [f"{rope} attend within chunks of {model['chunk_size']:,}"] if rope else []
    attention += [f"{layers - rope} attend globally"] if rope < layers else []
    text = f"{layers} layers of width {model['hidden_size']:,}: {', '.join(kinds)}; {', '.join(attention)}"
    vision, audio = model["vision"], model["audio"]
    if vision:
        text += (
            f"; vision encoder of {vision['layers']} layers of width {vision['hidden_size']:,}, a tile of "
            f"{vision['image_size']} px is {vision['tokens_per_tile']} tokens"
        )
    if audio:
        text += (
            f"; audio encoder of {audio['layers']} layers of width {audio['hidden_size']:,}, a window of "
            f"{audio['window_frames']} frames is {audio['tokens_per_window']} tokens"
        )
    return text if vision or audio else f"{text}; text only"


def number_table(*headings: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _parts_table(facts: Mapping[str, Any]) -> Table:
    counts, flops, model = facts["parameters"], facts["flops"], facts["model"]
    forward = flops["forward"]
    share_visited = model["experts_per_token"] / model["experts"]
    active = {name: counts[name] for name, _ in PARTS} | {
        "routed_experts": round(counts["routed_experts"] * share_visited),
        "text": counts["active"],
    }
    cost = forward | {"attention": forward["attention_projections"], "text": forward["total"], "total": 0}
    table = number_table("part", "parameters", "share", "active per token", "forward per token")
    for name, label in PARTS:
        parameters, flop = counts[name], cost.get(name, 0)
        if not (parameters or flop) or (name == "total" and not (model["vision"] or model["audio"])):
            continue
        per_token = name not in (*MEDIA_PARTS, "total")
        table.add_row(
            label,
            _count(parameters) if parameters else "tied",
            _share(parameters / counts["total"]) if parameters else "",
            _count(active[name]) if parameters and per_token else "",
            compact(flop, "FLOP") if flop and per_token else "",
            style="bold" if name in ("text", "total") else "",
        )
        if name == "attention":
            table.add_row("  scores", "", "", "", compact(forward["attention_scores"], "FLOP"))
    return table


def _parts_notes(facts: Mapping[str, Any]) -> list[str]:
    flops = facts["flops"]
    notes = [
        "Active: all text weights but the routed experts that a token does not visit; the embedding table counts.",
        f"FLOPs: of a token in a document of {flops['sequence_length']:,}. {flops['formula']}",
    ]
    for what, cost in (("An image tile", flops["image_tile"]), ("A window of sound", flops["audio_window"])):
        if cost:
            forward, training = compact(cost["forward"], "FLOP"), compact(cost["training"], "FLOP")
            notes.append(f"{what} costs {forward} forward and {training} in training, its tokens not included.")
    return notes


def _length_table(facts: Mapping[str, Any]) -> Table:
    flops, cache = facts["flops"], facts["kv_cache"]
    table = number_table(
        "tokens of\na document",
        "forward\nper token",
        "training\nper token",
        "share of\nscores",
        "KV cache of\nthe document",
        "the same\nwithout chunks",
    )
    for cost, kept in zip(flops["by_length"], cache["by_length"], strict=True):
        table.add_row(
            f"{cost['tokens']:>10,}",
            compact(cost["forward"], "FLOP"),
            compact(cost["training"], "FLOP"),
            percent(cost["attention_scores"] / cost["forward"]),
            _binary(kept["bytes"]),
            _binary(kept["bytes_unchunked"]),
            style="bold" if cost["tokens"] == flops["sequence_length"] else "",
        )
    return table


def _length_notes(facts: Mapping[str, Any]) -> list[str]:
    cache, model = facts["kv_cache"], facts["model"]
    each, token = _binary(cache["bytes_per_token_and_layer"]), _binary(cache["bytes_per_token"])
    note = f"KV cache: {cache['dtype']}, {each} per token and layer, {token} per token"
    if model["rope_layers"]:
        beyond = cache["bytes_per_token_beyond_a_chunk"]
        note += (
            f"; beyond {model['chunk_size']:,} tokens chunked layers stop growing, and a token adds {_binary(beyond)}"
        )
    return [f"{note}. Powers of 1024."]


def _memory_table(facts: Mapping[str, Any]) -> Table:
    memory, total = facts["memory"], facts["parameters"]["total"]
    table = number_table("memory", "per parameter", "bytes", *(device["name"] for device in memory["devices"]))
    labels = {"training": "training, as here", "training_mixed": "training, bfloat16"}
    for row in memory["rows"]:
        table.add_row(
            labels.get(row["name"], f"weights, {row['name']}"),
            f"{row['bytes'] / total:.2f} B",
            compact(row["bytes"], "B"),
            *(f"{count:,}" for count in row["devices"].values()),
        )
    return table


def _memory_notes(memory: Mapping[str, Any]) -> list[str]:
    holds = {row["name"]: row["holds"] for row in memory["rows"]}
    return [
        f"int8, int4: {holds['int8']}.",
        f"training: {holds['training']}; {holds['training_mixed']}.",
        "Devices: how many of them hold these bytes and nothing else; activations, caches and images come on top. "
        "Powers of 1000.",
    ]


def _share(share: float) -> str:
    """A part of the whole in percent; what is too small for that is not shown as nothing."""
    return percent(share) if share >= 0.0005 else "< 0.1 %"


def _count(number: int) -> str:
    """A number of parameters: 108641793536 -> "108.642 B", 15728640 -> "15.73 M"."""
    for scale, unit, digits in ((1e9, "B", 3), (1e6, "M", 2), (1e3, "k", 1)):
        if number >= (0.1 if unit == "B" else 1) * scale:
            return f"{number / scale:,.{digits}f} {unit}"
    return str(number)


def _binary(size: int) -> str:
    """A number of bytes in powers of 1024: 201326592 -> "192 MiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = max(0, min(len(units) - 1, (size.bit_length() - 1) // 10))
    value = size / 1024**power
    return f"{value:.0f} {units[power]}" if value >= 99.95 or value == int(value) else f"{value:.1f} {units[power]}"
