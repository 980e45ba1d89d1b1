"""A page that shows a batch as the model gets it: rows and their segments, texts with their weights, files in their places."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from data.pipeline import Batch, Dataset, Placed
from data.tokenizer import AUDIO, PATCH, Tokenizer
from sharding.errors import UserError
from trainer.pictures import png, spectrogram
from trainer.progress import work_bar
from trainer.report_page import page, section, tile

COLOURS = ("blue", "vermilion", "green", "violet", "sky")
_STRIDE = 200
"""Batches between two that are asked for on the way to a later one."""
_STYLE = """
<style>
.bar { position: relative; height: 30px; background: var(--rule); border-radius: 4px; overflow: hidden; margin: 10px 0 14px; }
.bar i { position: absolute; top: 0; bottom: 0; border-right: 1px solid var(--paper); opacity: 0.85; }
.bar i.weighted { top: 24px; background: var(--ink) !important; border: 0; opacity: 0.9; }
.segment { border-left: 4px solid var(--c); padding: 2px 0 2px 12px; margin: 0 0 14px; }
.segment h3 small { display: inline; }
.tokens { font: 12.5px/1.75 ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.tokens .off { color: var(--faint); }
.tokens .more { background: var(--warn-paper); color: var(--warn); }
.tokens b { font-weight: 400; color: var(--soft); border: 1px solid var(--frame); border-radius: 3px; padding: 0 3px;
  font-size: 11px; }
.tokens u { text-decoration: none; border-left: 1px solid var(--rule); }
.tokens img { height: 72px; margin: 2px 3px; vertical-align: middle; border: 1px solid var(--frame);
  image-rendering: pixelated; }
</style>
"""


def write_data_page(run: str, dataset: Dataset, step: int, held_out: bool, out: Path) -> str:
    """Writes the page of the batch that a step trains on, and returns a line that sums it up.

    Args:
        run: its name.
        dataset: the run's, of the split.
        step: from 1; with `held_out`, the number of the held-out batch.
        held_out: which split it is.
        out: the HTML file.

    Raises:
        UserError: the data cannot be read, or `out` not written.
    """
    batch, placed = dataset.batch(step - 1), dataset.placed(step - 1)
    B, S = batch["tokens"].shape
    used, weighted = (batch["segment_ids"] > 0).sum(), (batch["loss_weights"] > 0).sum()
    name = f"{run}: {'held-out batch' if held_out else 'batch of step'} {step}"
    figures = [
        tile(f"{100 * used / (B * S):.1f}", "%", f"of {B} x {S} token slots used"),
        tile(f"{100 * weighted / max(used, 1):.1f}", "%", "of the tokens weigh in the loss"),
        tile(f"{sum(map(len, placed))}", "", "segments"),
    ]
    for kind, label in (("image", "image tiles"), ("audio", "windows of sound")):
        if f"{kind}_positions" in batch:
            slots = batch[f"{kind}_positions"]
            figures.append(tile(f"{(slots >= 0).any(axis=2).sum()}", f"of {slots.shape[0] * slots.shape[1]}", label))
    rows = [
        section(
            f"Row {b + 1}",
            f"{len(segments)} segments",
            _bar(batch, b, segments),
            *_segments(batch, b, segments, dataset),
        )
        for b, segments in enumerate(placed)
    ]
    lead = "Grey tokens have no weight in the loss, marked ones weigh more or less than 1. A segment sees nothing of another."
    top = (
        f'<header><h1>{escape(name)}</h1></header><p class="lead">{lead}</p><div class="tiles">{"".join(figures)}</div>'
    )
    try:
        out.write_text(page(name, _STYLE + top + "\n".join(rows)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}). Give another file.") from error
    return f"{out}: {B} rows, {sum(map(len, placed))} segments, {100 * used / (B * S):.1f} % of the token slots used"


def reach(dataset: Dataset, first: int, batch: int) -> None:
    """Packs the rows up to a batch, and shows how far it is: from the start of the data, that may take long.

    Args:
        dataset: whose batch is to be shown.
        first: the first batch that it finds without packing those before.
        batch: from 0.
    """
    strides = range(first, batch, _STRIDE)
    if len(strides) > 1:
        with work_bar("packing", len(strides)) as done:
            for at in strides:
                dataset.position(at)
                done(f"batch {at:,} of {batch:,}")


def _colour(segment: int) -> str:
    return f"var(--{COLOURS[segment % len(COLOURS)]})"


def _bar(batch: Batch, b: int, segments: Sequence[Placed]) -> str:
    S = batch["tokens"].shape[1]

    def box(start: int, length: int, style: str, title: str = "", kind: str = "") -> str:
        place = f"left:{100 * start / S:.3f}%;width:{100 * length / S:.3f}%"
        return f'<i class="{kind}" style="{place};{style}" title="{escape(title)}"></i>'

    boxes = [
        box(one.start, one.length, f"background:{_colour(i)}", f"{i}: {one.id}")
        for i, one in enumerate(segments, start=1)
    ]
    edges = np.flatnonzero(np.diff((batch["loss_weights"][b] > 0).astype(np.int8), prepend=0, append=0))
    boxes += [box(int(a), int(z - a), "", "weighted", "weighted") for a, z in edges.reshape(-1, 2)]
    return f'<div class="bar">{"".join(boxes)}</div>'


def _segments(batch: Batch, b: int, segments: Sequence[Placed], dataset: Dataset) -> list[str]:
    pictures = _pictures(batch, b)
    shown = []
    for i, one in enumerate(segments, start=1):
        tokens = _tokens(batch, b, one, dataset.tokenizer, pictures)
        detail = f"{one.source} · {one.where} · tokens {one.start} to {one.start + one.length - 1}"
        shown.append(
            f'<div class="segment" style="--c:{_colour(i)}">'
            f'<h3>{i}. {escape(one.id)}<small>{escape(detail)}</small></h3><div class="tokens">{tokens}</div></div>'
        )
    return shown


def _tokens(batch: Batch, b: int, one: Placed, tokenizer: Tokenizer, pictures: dict[int, str]) -> str:
    """The tokens of a segment; runs of those that stand for a file as one picture."""
    names = {number: name for name, number in tokenizer.special.items()}
    silent = {tokenizer.special.get(PATCH), tokenizer.special.get(AUDIO)}
    parts, run, weight_of_run = [], bytearray(), -1.0

    def flush() -> None:
        if run:
            kind = "off" if weight_of_run == 0 else "more" if weight_of_run != 1 else ""
            parts.append(f'<span class="{kind}">{escape(run.decode("utf-8", "replace"))}</span>')
            run.clear()

    for at in range(one.start, one.start + one.length):
        token = int(batch["tokens"][b, at])
        # A token is predicted by the one before it.
        weight = float(batch["loss_weights"][b, at - 1]) if at > one.start else 0.0
        if at in pictures:
            flush()
            parts.append(pictures[at])
        if token in silent:
            continue
        if token in names:
            flush()
            parts.append(f"<b>{escape(names[token].strip('<|>'))}</b>")
            continue
        if weight != weight_of_run:
            flush()
            weight_of_run = weight
        run += tokenizer.token_bytes(token)
    flush()
    return "".join(parts)


def _pictures(batch: Batch, b: int) -> dict[int, str]:
    """HTML of each tile and each window of sound, by the index of its first token."""
    found = {}
    if "image_positions" in batch:
        for slot, positions in enumerate(batch["image_positions"][b]):
            if positions[0] >= 0:
                found[int(positions[0])] = _img(Image.fromarray(batch["image_tiles"][b, slot]), f"tile {slot + 1}")
    if "audio_positions" in batch:
        for slot, positions in enumerate(batch["audio_positions"][b]):
            if positions[0] >= 0:
                picture = spectrogram(batch["audio_frames"][b, slot])
                found[int(positions[0])] = _img(picture, f"window {slot + 1}")
    return found


def _img(image: Image.Image, title: str) -> str:
    return f'<img alt="{title}" title="{title}" src="data:image/png;base64,{png(image)}">'
