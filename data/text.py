"""Text that every Python carries: the language's documentation topics and the modules of its standard library."""

import hashlib
import importlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from sharding.errors import UserError

_HELD_OUT_SHARE = 0.06


@dataclass(frozen=True)
class TextFile:
    """One file or documentation topic."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Decided by the name alone, so that a file stays on its side of the split whatever else changes."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big") < _HELD_OUT_SHARE * 2**64


def standard_library() -> list[TextFile]:
    """The documentation topics, then the top-level modules of the standard library, in order of their names.

    Packages, and modules whose name begins with an underscore (some are generated for one machine), are left out. A
    Python without documentation topics gives the modules alone.

    Raises:
        UserError: there is neither.
    """
    files = [TextFile(f"topics/{name}", text) for name, text in sorted(_topics().items())]
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("_"):
            try:
                files.append(TextFile(path.name, path.read_text(encoding="utf-8")))
            except (OSError, UnicodeDecodeError):
                continue  # a few distributions ship a module in another encoding or out of reach
    files = [file for file in files if file.text.strip()]
    if not any(file.held_out for file in files) or all(file.held_out for file in files):
        raise UserError(
            f"data.mixture.text: found {len(files)} readable files in {folder}, expected the standard library. "
            "Use a Python that carries them, or set data.mixture.text=0."
        )
    return files


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
