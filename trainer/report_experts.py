"""The expert-load heat map of the report: one strip per mixture layer, experts over time, as inline SVG."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from trainer.report_charts import Axis, step_label, svg
from trainer.report_text import percent

UNDER, OVER = (0, 97, 168), (213, 94, 0)
"""Blue and vermilion: told apart with any colour vision (Okabe and Ito, 2008)."""
SPAN = 2.0
"""Octaves from the ideal share to full colour: a quarter and four times."""
COLUMNS = 300


def heat_map(steps: Sequence[int], loads: Sequence[Sequence[Sequence[float]]], layers: Sequence[int]) -> str:
    """`loads[record][layer][expert]` are shares that sum to one; `layers` names the strips.

    The share 1/E has the colour of the page, more is vermilion, less is blue. The bars on the right are the mean over
    the last tenth of the run, beside a line at 1/E.
    """
    load_RLE = np.asarray(loads, float)
    records, count, experts = load_RLE.shape
    columns, end = min(COLUMNS, records), max(1, steps[-1])
    edges = np.linspace(0, end, columns + 1)[1:]
    # The record that was current at each column: a run may have logged at uneven steps.
    shown_CLE = load_RLE[np.minimum(np.searchsorted(steps, edges - 1e-9), records - 1)]
    late_LE = np.nanmean(load_RLE[-max(1, records // 10) :], axis=0)

    width, left, gap, bars = 1160, 92, 26, 210
    strip = min(150.0, max(20.0, 11.0 * experts), max(20.0, 900 / count))
    x = Axis(0, end, left, width - bars - gap)
    most = max(2 / experts, 1.1 * np.nanmax(late_LE)) if np.isfinite(late_LE).any() else 2 / experts
    share = Axis(0, float(most), x.end + gap, width - 2)
    parts, top = [], 30.0
    parts.append(
        f'<text class="tick" x="{share(1 / experts):.1f}" y="18" text-anchor="middle">1/E = {percent(1 / experts, 2)}</text>'
    )
    for layer in range(count):
        parts.append(f'<text class="group" x="0" y="{top + 13:.1f}">layer {layers[layer]}</text>')
        for expert, at in ((0, 10.0), (experts - 1, strip - 1)) if strip > 30 else ():
            parts.append(f'<text class="tick" x="{left - 8}" y="{top + at:.1f}" text-anchor="end">{expert}</text>')
        parts.append(
            f'<image x="{left}" y="{top:.1f}" width="{x.end - left}" height="{strip:.1f}" preserveAspectRatio="none" '
            f'href="{_png(shown_CLE[:, layer].T, experts)}"/>'
            f'<rect class="frame" x="{left}" y="{top:.1f}" width="{x.end - left}" height="{strip:.1f}"/>'
        )
        row = strip / experts
        for expert, load in enumerate(late_LE[layer]):
            if math.isfinite(load):
                parts.append(
                    f'<rect class="load" x="{share.start}" y="{top + expert * row + 0.08 * row:.2f}" '
                    f'width="{share(load) - share.start:.1f}" height="{0.84 * row:.2f}">'
                    f"<title>layer {layers[layer]}, expert {expert}: {percent(load)}</title></rect>"
                )
        ideal = share(1 / experts)
        parts.append(
            f'<line class="even" x1="{ideal:.1f}" x2="{ideal:.1f}" y1="{top - 4:.1f}" y2="{top + strip + 4:.1f}"/>'
        )
        top += strip + 14
    for tick in x.ticks(8):
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{top + 6:.1f}" text-anchor="middle">{step_label(tick)}</text>'
        )
    parts.append(f'<text class="tick" x="{share.start:.1f}" y="{top + 6:.1f}">load at the end of the run</text>')
    return svg(width, top + 14, "expert load per layer over steps", "".join(parts))


def scale(experts: int) -> str:
    """The colours of the heat map, as a legend."""
    ratios = 2.0 ** np.linspace(-SPAN, SPAN, 65)
    ideal = f"1/E = {percent(1 / experts, 2)}"
    names = "".join(f"<span>{escape(n)}</span>" for n in ("¼ of ideal", "½", ideal, "2 ×", "4 × ideal"))
    picture = _png(ratios[None, :] / experts, experts)
    return f'<div class="scale"><img alt="colour scale" src="{picture}"><div>{names}</div></div>'


def _png(load_EC: np.ndarray, experts: int) -> str:
    """One pixel per cell, transparent at the ideal share, so that it lies on a light page as on a dark one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves_EC = np.clip(np.log2(load_EC * experts), -SPAN, SPAN) / SPAN
    octaves_EC = np.nan_to_num(octaves_EC)
    pixels = np.where((octaves_EC > 0)[..., None], OVER, UNDER).astype(np.uint8)
    alpha = np.round(255 * np.abs(octaves_EC) ** 0.8).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.concatenate([pixels, alpha[..., None]], -1), "RGBA").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
