"""Charts of the report as inline SVG: no fonts, scripts or colours of their own; `report_page.py` styles their classes.

Coordinates are CSS pixels of the `viewBox`, from the top left.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

from trainer.report_scores import CONDITIONS, AttributeScores
from trainer.report_text import percent

MAX_POINTS = 600
"""Points of a curve; more are gathered into buckets, whose mean is smoothed and whose extremes stay visible."""


Style = Literal["noisy", "exact", "points"]
"""Raw values under a smoothed line; the values themselves; or marks joined by a thin line (held-out scores)."""


@dataclass(frozen=True)
class Series:
    """One curve: values at steps."""

    name: str
    colour: str
    """Class that sets `--c`, one of c1 to c4."""
    steps: Sequence[float]
    values: Sequence[float]
    style: Style = "noisy"


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels. `start` and `end` are the pixels of `low` and `high`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the axis."""
        if not self.log:
            raw = (self.high - self.low) / count
            power = 10.0 ** math.floor(math.log10(raw))
            step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
            return [i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(d / 10 for d in range(10, 100))):
            inside = [d * 10.0**p for p in decades for d in digits if self.low <= d * 10.0**p <= self.high]
            if len(inside) >= min(count, 4):
                return inside if len(inside) <= 9 else inside[:: -(-len(inside) // 7)]
        return [self.low, self.high]


def smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian mean over about 5 % of the points, less at the start, where curves are steep; what is not finite has no
    weight."""
    index = np.arange(len(values), dtype=float)
    sigma = np.minimum(max(1.5, len(values) / 45), 0.35 * (index + 1))
    kernel = np.exp(-0.5 * ((index[:, None] - index[None, :]) / sigma[:, None]) ** 2)
    finite = np.isfinite(values)
    weight = kernel @ finite
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight > 0.05, kernel @ np.where(finite, values, 0.0) / weight, np.nan)


def buckets(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` mean steps, and for each of them (mean, lowest, highest) of the finite values, or NaN."""
    groups = np.array_split(np.arange(len(steps)), min(MAX_POINTS, len(steps)))
    finite = [values[g][np.isfinite(values[g])] for g in groups]
    summary = [(v.mean(), v.min(), v.max()) if len(v) else (np.nan,) * 3 for v in finite]
    return np.array([steps[g].mean() for g in groups]), np.array(summary).T


def line_chart(
    series: Sequence[Series],
    label: Callable[[float], str],
    *,
    width: int = 560,
    height: int = 230,
    log: bool = False,
    zero: bool = False,
    ideal: tuple[float, str] | None = None,
) -> str:
    """Curves over steps. `label` writes a value on the axis; `zero` starts the axis at nought; `ideal` is a marked value
    and its name. Values that are not finite are not drawn."""
    series = [s for s in series if len(s.steps)]
    finite = [v for s in series for v in s.values if math.isfinite(v)]
    if not finite:
        return '<p class="empty">No finite value was recorded.</p>'
    log = log and min(finite) > 0
    marks = [*finite, *([ideal[0]] if ideal else [])]
    low, high = min(marks), max(marks)
    if log:
        low, high = low / 1.06, max(high, 1.3 * low) * 1.06
    else:
        room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = (0.0 if zero and low >= 0 else low - room), high + room
    named = len(series) > 1
    right = 196 if named else 16
    x = Axis(0, max(1, *(step for s in series for step in s.steps)), 58, width - right)
    y = Axis(low, high, height - 30, 10, log)
    parts = [_grid(x, y, label)]
    if ideal:
        at = y(ideal[0])
        parts.append(f'<line class="ideal" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="note" x="{x.start + 6}" y="{at - 6:.1f}">{escape(ideal[1])}</text>')
    ends: list[tuple[float, Series, float]] = []
    for one in series:
        steps, values = np.asarray(one.steps, float), np.asarray(one.values, float)
        middle, (mean, lowest, highest) = buckets(steps, values)
        if one.style == "points":
            drawn = mean
            parts.append(_path(f"held {one.colour}", x, y, middle, mean))
            parts += [
                f'<circle class="mark {one.colour}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.2">'
                f"<title>{escape(one.name)}, step {s:.0f}: {escape(label(v))}</title></circle>"
                for s, v in zip(middle, mean, strict=True)
                if math.isfinite(v)
            ]
        elif one.style == "exact":
            drawn = mean
            parts.append(_path(f"smooth {one.colour}", x, y, middle, mean))
        else:
            raw = np.stack([lowest, highest], 1).ravel() if len(steps) > MAX_POINTS else mean
            parts.append(_path(f"raw {one.colour}", x, y, np.repeat(middle, len(raw) // len(middle)), raw))
            drawn = np.exp(smooth(np.log(mean))) if log else smooth(mean)
            parts.append(_path(f"smooth {one.colour}", x, y, middle, drawn))
        last = drawn[np.isfinite(drawn)]
        if len(last):
            ends.append((y(last[-1]), one, float(last[-1])))
    if named:
        parts.append(_end_labels(ends, x.end + 10, label))
    return svg(width, height, ", ".join(s.name for s in series) + " over steps", "".join(parts))


def question_chart(scores: Sequence[AttributeScores], *, width: int = 1160, height: int = 330) -> str:
    """Grouped bars: accuracy per attribute and condition with 95 % intervals, and a mark at chance."""
    x0, x1 = 46, width
    y = Axis(0, 1, height - 44, 16)
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{x0}" x2="{x1}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{x0 - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:.0f} %</text>'
        )
    group = (x1 - x0) / len(scores)
    bar = min(38.0, group * 0.8 / len(CONDITIONS))
    for i, row in enumerate(scores):
        middle = x0 + (i + 0.5) * group
        left = middle - bar * len(CONDITIONS) / 2
        asked = max((c.count for name, _ in CONDITIONS if (c := getattr(row, name)) is not None), default=0)
        for j, (name, shown) in enumerate(CONDITIONS):
            score = getattr(row, name)
            if score is None:
                continue
            at, (low, high) = left + j * bar, score.interval()
            centre = at + bar / 2
            parts.append(
                f'<rect class="bar {name}" x="{at + 1.5:.1f}" width="{bar - 3:.1f}" y="{y(score.share):.1f}" '
                f'height="{y(0) - y(score.share):.1f}" rx="2"><title>{escape(row.attribute)}, {shown}: {score.correct} of '
                f"{score.count} right, 95 % interval {percent(low, 0)} to {percent(high, 0)}</title></rect>"
                f'<line class="whisker" x1="{centre:.1f}" x2="{centre:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>'
            )
            if name in ("seen", "novel"):
                parts.append(
                    f'<text class="value" x="{centre:.1f}" y="{y(high) - 5:.1f}" text-anchor="middle">'
                    f"{100 * score.share:.0f}</text>"
                )
        edge = bar * len(CONDITIONS) / 2 + 6
        parts.append(
            f'<line class="chance" x1="{middle - edge:.1f}" x2="{middle + edge:.1f}" y1="{y(row.chance):.1f}" '
            f'y2="{y(row.chance):.1f}"><title>chance: {percent(row.chance)}</title></line>'
            f'<text class="group" x="{middle:.1f}" y="{height - 24}" text-anchor="middle">{escape(row.attribute)}'
            f"<title>{asked} questions for each kind of image</title></text>"
            f'<text class="tick" x="{middle:.1f}" y="{height - 8}" text-anchor="middle">'
            f"chance {percent(row.chance, 0)}</text>"
        )
    return svg(width, height, "accuracy per attribute", "".join(parts))


def _grid(x: Axis, y: Axis, label: Callable[[float], str]) -> str:
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{x.start - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(label(tick))}</text>'
        )
    bottom = max(y.start, y.end)
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{bottom}" y2="{bottom}"/>')
    for tick in x.ticks(max(3, round((x.end - x.start) / 130))):
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{step_label(tick)}</text>'
        )
    return "".join(parts)


def step_label(step: float) -> str:
    """12000 -> "12k"."""
    return short(step) if step >= 10000 else f"{step:g}"


def short(value: float) -> str:
    """A value on an axis: 15000 -> "15k", 2500000 -> "2.5M"."""
    scale, prefix = next(((s, p) for s, p in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s), (1, ""))
    return f"{value / scale:g}{prefix}"


def _path(classes: str, x: Axis, y: Axis, steps: np.ndarray, values: np.ndarray) -> str:
    points, pen = [], "M"
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            points.append(f"{pen}{x(step):.1f} {y(value):.1f}")
            pen = "L"
        else:
            pen = "M"
    return f'<path class="{classes}" d="{"".join(points)}"/>'


def _end_labels(ends: list[tuple[float, Series, float]], at: float, label: Callable[[float], str]) -> str:
    """Names at the right end of the curves, moved apart where they would overlap."""
    parts, previous = [], -math.inf
    for y, one, value in sorted(ends, key=lambda end: end[0]):
        previous = max(y + 4, previous + 17)
        parts.append(
            f'<text class="end {one.colour}" x="{at:.1f}" y="{previous:.1f}">{escape(one.name)} '
            f'<tspan class="last">{escape(label(value))}</tspan></text>'
        )
    return "".join(parts)


def svg(width: float, height: float, name: str, body: str) -> str:
    """A picture that fills its column; the text of wide ones is enlarged where the column is narrow."""
    size = ' class="wide"' if width > 800 else ""
    return f'<svg{size} viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(name)}">{body}</svg>'
