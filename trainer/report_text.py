"""Numbers as people read them; shared by the console and the report."""

from collections.abc import Mapping
from typing import Any

_PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def compact(value: float, unit: str = "") -> str:
    """Three digits and an SI prefix: 12345 -> "12.3 k"; with a unit, "12.3 kFLOP/s"."""
    if value == 0:
        return f"0 {unit}".rstrip()
    for scale, prefix in _PREFIXES:
        if abs(value) >= 0.9995 * scale:
            return f"{_three_digits(value / scale)} {prefix}{unit}".rstrip()
    return f"{_three_digits(value)} {unit}".rstrip()


def count(value: float) -> str:
    """A number of parameters: 108641793536 -> "109 B"."""
    return compact(value).replace(" G", " B").replace(" k", " thousand")


def duration(seconds: float) -> str:
    """0.42 -> "0.42 s", 14.2 -> "14.2 s", 222 -> "3:42 min", 7322 -> "2:02 h", 300000 -> "3 d 11 h"."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}:{minutes % 60:02d} h"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def percent(share: float, digits: int = 1) -> str:
    """0.231 -> "23.1 %"."""
    return f"{100 * share:.{digits}f} %"


def without_targets(record: Mapping[str, Any]) -> str:
    """How many segments a cache of targets had nothing for, by a record of the metrics; empty where that is none."""
    found, missing, damaged = (record.get(f"cache/{name}", 0) for name in ("found", "missing", "damaged"))
    if not missing + damaged:
        return ""
    return (
        f"{missing + damaged:,} of {found + missing + damaged:,} segments had no targets ({missing:,} missing, {damaged:,} "
        "damaged), and were learned from the next token alone"
    )


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
