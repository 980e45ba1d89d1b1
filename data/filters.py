"""Rules that a document must meet, and changes to its texts, by name. Users bring their own as a classifier."""

import importlib.util
import sys
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from data.documents import MEDIA, Document, Rejected
from data.records import Entry
from sharding.errors import UserError

Rule = Callable[[Document, Entry, float], str | None]
"""(document, its entry in the index, limit) -> why it is refused, or None."""
Classifier = Callable[[Document], object]
"""Why a document is refused; None or an empty string to keep it."""


def _text(document: Document) -> str:
    return "\n".join(part.text for part in document.parts if part.kind == "text")


def _fewer_tokens(document: Document, entry: Entry, limit: float) -> str | None:
    return f"found {entry.tokens} tokens of text" if entry.tokens < limit else None


def _more_tokens(document: Document, entry: Entry, limit: float) -> str | None:
    return f"found {entry.tokens} tokens of text" if entry.tokens > limit else None


def _repeated_lines(document: Document, entry: Entry, limit: float) -> str | None:
    lines = [line.strip() for line in _text(document).splitlines() if line.strip()]
    share = 1 - len(set(lines)) / len(lines) if lines else 0.0
    return f"found {share:.0%} of the lines to repeat others" if share > limit else None


def _symbols(document: Document, entry: Entry, limit: float) -> str | None:
    written = [character for character in _text(document) if not character.isspace()]
    share = sum(not character.isalnum() for character in written) / len(written) if written else 0.0
    return f"found {share:.0%} of the characters to be neither letters nor digits" if share > limit else None


def _small_image(document: Document, entry: Entry, limit: float) -> str | None:
    return _image(entry, lambda height, width: min(height, width) < limit)


def _long_image(document: Document, entry: Entry, limit: float) -> str | None:
    return _image(entry, lambda height, width: max(height, width) > limit * min(height, width))


def _image(entry: Entry, refused: Callable[[int, int], bool]) -> str | None:
    for kind, (height, width, *_) in zip(entry.kinds, entry.facts, strict=True):
        if MEDIA[kind] == "image" and refused(height, width):
            return f"found an image of {width} x {height} pixels"
    return None


FILTERS: Mapping[str, Rule] = {
    "min_tokens": _fewer_tokens,
    "max_tokens": _more_tokens,
    "max_repeated_lines": _repeated_lines,
    "max_symbols": _symbols,
    "min_image_side": _small_image,
    "max_image_aspect": _long_image,
}
"""Named rules; each takes a number. Shares are from 0 to 1, sides in pixels."""
TRANSFORMS: Mapping[str, Callable[[str], str]] = {
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "unix_newlines": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "strip_lines": lambda text: "\n".join(line.rstrip() for line in text.split("\n")),
}
"""Named changes to every text of a document, made in the order in which they are asked for."""


def parse_filter(written: str) -> tuple[str, float]:
    """(name, limit) of a filter written NAME=NUMBER; `UserError` where it is none."""
    name, _, value = written.partition("=")
    try:
        limit = float(value)
    except ValueError:
        limit = float("nan")
    if name not in FILTERS or limit != limit:
        raise UserError(f"--filter: found {written!r}, expected NAME=NUMBER with a name of {', '.join(FILTERS)}")
    return name, limit


def transformed(document: Document, names: tuple[str, ...]) -> Document:
    """The document with its texts changed."""
    parts = []
    for part in document.parts:
        text = part.text
        for name in names:
            text = TRANSFORMS[name](text)
        parts.append(replace(part, text=text))
    return replace(document, parts=tuple(parts))


def check(
    document: Document, entry: Entry, filters: tuple[tuple[str, float], ...], classify: Classifier | None
) -> None:
    """Raises `Rejected` with the first rule that refuses the document, `UserError` where the classifier fails."""
    for name, limit in filters:
        if reason := FILTERS[name](document, entry, limit):
            raise Rejected(name, f"{reason}, refused by {name}={limit:g}")
    if not classify:
        return
    try:
        reason = classify(document)
    except Rejected:
        raise
    except (Exception, SystemExit) as error:
        # It says nothing of the document, and dropping documents for a mistake in the code would change the data.
        raise UserError(
            f"--classifier: fails on {document.id!r} ({type(error).__name__}: {error}). Let it return why a document is "
            "refused, or None."
        ) from error
    if reason:
        raise Rejected("classifier", str(reason))


def load_classifier(written: str) -> Classifier:
    """The function NAME of a Python file, written FILE.py:NAME. The file is code, and is run.

    Raises:
        UserError: there is no such file or function.
    """
    path, _, name = written.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"--classifier: found {written!r}, expected FILE.py:FUNCTION; there is no file {path!r}")
    spec = importlib.util.spec_from_file_location("_drover_classifier", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--classifier: {path} is no Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--classifier: {path} fails when it is run ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--classifier: {path} has no function {name!r}")
    return function
