"""Text that every Python carries: the language's documentation topics and the modules of its standard library."""

import hashlib
import importlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sharding.errors import UserError

_HELD_OUT_SHARE = 0.06
_NAMED = 5


@dataclass(frozen=True)
class TextFile:
    """One file or documentation topic."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Decided by the name alone, so that a file stays on its side of the split whatever else changes."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big") < _HELD_OUT_SHARE * 2**64


class Corpus(NamedTuple):
    """The text of both splits."""

    files: list[TextFile]
    notes: tuple[str, ...]
    """What is missing from it, one line for the user each."""


def standard_library() -> Corpus:
    """The documentation topics, then the top-level modules of the standard library, in order of their names.

    Packages, and modules whose name begins with an underscore (some are generated for one machine), are left out. What
    else is not there, a note says: modules that cannot be read, and the topics of a Python that has none.

    Raises:
        UserError: one of the splits has no text.
    """
    files = [TextFile(f"topics/{name}", text) for name, text in sorted(_topics().items())]
    notes = () if files else ("text: this Python has no pydoc_data; its documentation topics are missing",)
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
    skipped = []
    for path in paths:
        try:
            files.append(TextFile(path.name, path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):  # a few distributions ship a module in another encoding or out of reach
            skipped.append(path.name)
    files = [file for file in files if file.text.strip()]
    if not any(file.held_out for file in files) or all(file.held_out for file in files):
        raise UserError(
            f"data.mixture.text: found {len(files)} readable files and {len(skipped)} unreadable ones in {folder}, "
            "expected the standard library. Use a Python that carries it, or set data.mixture.text=0."
        )
    if skipped:
        names = ", ".join(skipped[:_NAMED]) + (f" and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else "")
        were = "was" if len(skipped) == 1 else "were"
        notes += (f"text: {len(skipped)} of {len(paths)} files could not be read and {were} skipped: {names}",)
    return Corpus(files, notes)


def digest(files: list[TextFile]) -> str:
    """Names the content: another Python version gives another digest."""
    content = hashlib.sha256()
    for file in files:
        for part in (file.name, file.text):
            encoded = part.encode("utf-8", "replace")
            content.update(len(encoded).to_bytes(8, "big") + encoded)
    return content.hexdigest()


def _topics() -> dict[str, str]:
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:  # some distributions package the documentation apart
        return {}
