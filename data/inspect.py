"""What a prepared data set holds, in numbers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, MediaSpec
from data.documents import MEDIA
from data.items import COUNTS, Room, cut
from data.media import Media
from data.prepared import Prepared
from data.tokenizer import load_file
from sharding.errors import UserError

QUANTILES = {"least": 0.0, "median": 0.5, "mean": None, "90 %": 0.9, "99 %": 0.99, "most": 1.0}


def inspect_data(folder: Path) -> dict[str, Any]:
    """Counts of the documents, texts, files and rejected records.

    Raises:
        UserError: the folder holds no prepared data, or it is unfinished or damaged.
    """
    data = Prepared.open(folder)
    index, facts = data.index, dict(data.facts)
    files = {}
    for number, kind in enumerate(MEDIA):
        of_kind = index.facts[index.kinds == number]
        if len(of_kind):
            files[kind] = {"files": len(of_kind)} | _sizes(kind, of_kind)
    return {
        "read": facts["read"],
        "documents": {"train": facts["written"] - facts["held_out"], "held out": facts["held_out"]},
        "rejected": facts["rejected"],
        "rejected first": _first_rejected(folder, facts["rejected"]),
        "files read only if a record names them": facts.get("read_only_if_named", {}),
        "text tokens": facts["tokens"],
        "tokens of a document": _spread(index.tokens),
        "files": files,
        "files of a document": _spread(np.diff(index.file_starts)),
        "sources": {name or "(not said)": count for name, count in facts["documents_by_source"].items()},
        "other sources": facts["other_sources"] if facts["other_sources"]["sources"] else {},
        "bytes": facts["bytes"],
        "tokenizer": facts["tokenizer"],
        "digest": facts["digest"],
        "made from": facts["sources"],
        "options": facts["options"],
    }


def inspect_rows(folder: Path, config: DataConfig, spec: MediaSpec) -> dict[str, Any]:
    """What a run's config makes of it: tokens by modality, and which documents do not fit a row.

    Raises:
        UserError: the data cannot be used with the config.
    """
    data = Prepared.open(folder)
    index, media = data.index, Media(spec, load_file(folder))
    media.check([kind for i, kind in enumerate(MEDIA) if (index.kinds == i).any()], str(folder))
    sizes = media.sizes(index.kinds, index.facts)
    room = Room(config.sequence_length, config.tiles_per_row, config.windows_per_row)
    items = cut(index, np.arange(len(index)), sizes, room, config.long_documents)
    by_kind = {kind: int(sizes[index.kinds == i, 0].sum()) for i, kind in enumerate(MEDIA)}
    return {
        "tokens": {"text": int(index.tokens.sum(dtype=np.int64))} | {kind: n for kind, n in by_kind.items() if n},
        "tiles": int(sizes[:, 1].sum()),
        "windows of sound": int(sizes[:, 2].sum()),
        "tokens of an item": _spread(items["sizes"][:, 0]),
        "too long for a row": dict(zip(COUNTS, items["counts"].tolist(), strict=True)),
    }


def _first_rejected(folder: Path, rules: Mapping[str, int]) -> dict[str, str]:
    """Of each rule, where the first record that it rejected was, and why; and the file with all of them."""
    if not rules:
        return {}
    first: dict[str, str] = {}
    path = folder / "rejected.jsonl"
    try:
        with path.open(encoding="utf-8") as lines:
            for line in map(json.loads, lines):
                first.setdefault(line["rule"], f"{line['where']}: {line['reason']}")
                if len(first) == len(rules):
                    break
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is missing or damaged ({error!r}). Prepare the data again.") from error
    return first | {"all of them": str(path)}


def _sizes(kind: str, facts: np.ndarray) -> dict[str, Any]:
    if kind == "audio":
        return {
            "seconds in all": round(float(facts[:, 0].sum(dtype=np.int64)) / 16000, 1),
            "seconds": _spread(facts[:, 0] / 16000),
        }
    if kind == "video":
        return _durations(facts[:, 0] / 1000) | _sides(facts[:, 1:])
    return _sides(facts)


def _durations(seconds: np.ndarray) -> dict[str, Any]:
    return {"seconds in all": round(float(seconds.sum()), 1), "seconds": _spread(seconds)}


def _sides(facts: np.ndarray) -> dict[str, Any]:
    return {"height": _spread(facts[:, 0]), "width": _spread(facts[:, 1])}


def _spread(values: np.ndarray) -> dict[str, float]:
    """Quantiles and mean."""
    if not len(values):
        return {}
    found = {name: np.mean(values) if q is None else np.quantile(values, q) for name, q in QUANTILES.items()}
    return {name: round(float(value), 1) for name, value in found.items()}


def render(facts: dict[str, Any], title: str) -> str:
    """The counts as text."""
    lines = [title]

    def add(name: str, value: Any, depth: int) -> None:
        pad = "  " * depth
        if isinstance(value, dict) and value and all(isinstance(inner, int | float) for inner in value.values()):
            lines.append(f"{pad}{name:23} " + "  ".join(f"{key} {_number(inner)}" for key, inner in value.items()))
        elif isinstance(value, dict):
            if value:
                lines.append(f"{pad}{name}")
            for key, inner in value.items():
                add(key, inner, depth + 1)
        elif isinstance(value, list | tuple):
            lines.append(f"{pad}{name:23} {', '.join(map(str, value)) or '-'}")
        else:
            lines.append(f"{pad}{name:23} {_number(value)}")

    for name, value in facts.items():
        add(name, value, 1)
    return "\n".join(lines)


def _number(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}".removesuffix(".0")
    return str(value) if value != "" else "-"
