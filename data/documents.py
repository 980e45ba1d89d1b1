"""The one form of a document: an ordered list of parts, each a text, an image, a video or a sound.

    {"id": "a1", "parts": [{"type": "image", "path": "cat.jpg"}, {"type": "text", "text": "A cat."}]}
    {"text": "A short text."}
    {"image": "cat.jpg", "text": "A cat."}
    {"messages": [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat."}]}

`document.schema.json` beside this file says the same as a JSON schema; docs/DATA.md explains the fields.
"""

import base64
import binascii
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from data.chat import ROLES

Kind = Literal["text", "image", "video", "audio"]
MEDIA: tuple[Kind, ...] = ("image", "video", "audio")
"""Kinds of parts that are files; their place in this tuple is their number in the index."""
FORMS = ("text", "parts", "messages")
"""Fields of which a record has one. Beside a text, or without one, `image`, `video` and `audio` may name files."""
FIELDS = (*FORMS, *MEDIA, "id", "source", "split", "metadata")
SPLITS = ("train", "heldout")
LONGEST_NAME = 512
"""Characters of an id or a source."""
LARGEST_WEIGHT = 1e6
_LONGEST_REASON = 500


class Rejected(Exception):
    """A record that cannot be used: by which rule, and why."""

    def __init__(self, rule: str, reason: str):
        # It may quote a name: of any length, and with bytes that no file of UTF-8 could hold.
        reason = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."
        reason = reason.encode("utf-8", "backslashreplace").decode()
        super().__init__(reason)
        self.rule, self.reason = rule, reason

    def __reduce__(self):
        return Rejected, (self.rule, self.reason)


@dataclass(frozen=True)
class Part:
    """One piece of a document."""

    kind: Kind
    text: str = ""
    """Of a text."""
    path: str = ""
    """Of a file beside the record's; empty where the bytes came with it."""
    data: bytes = b""
    """Of a file, once it was read."""
    role: str | None = None
    """Whose turn it belongs to, one of `data.chat.ROLES`; None in what is no conversation."""
    weight: float | None = None
    """Of a text's tokens in the loss; None for the default: 1, and 0 in turns that are not the assistant's."""
    new_turn: bool = False
    """Begins a turn, though the part before has the same role."""


@dataclass(frozen=True)
class Document:
    """What one record says."""

    id: str
    parts: tuple[Part, ...]
    source: str = ""
    """Where it comes from, in the words of who made the record."""
    split: Literal["", "train", "heldout"] = ""
    """Empty: decided by the hash of the id."""
    metadata: Mapping[str, Any] | None = None
    """Kept with the document, and not read."""

    @property
    def conversation(self) -> bool:
        return any(part.role is not None for part in self.parts)


def parse(record: Any, default_id: str, with_more: bool = False) -> Document:
    """The document of a record; files are named, not yet read.

    Fields of the record that are not of the schema are kept as metadata; parts have none but their own. With more to be
    added to it, its own text may be blank.

    Raises:
        Rejected: the record does not have the form. The reason names the field.
    """
    if not isinstance(record, Mapping):
        raise _wrong("", record, "an object")
    forms = [name for name in FORMS if record.get(name) is not None]
    beside: list[Kind] = [kind for kind in MEDIA if record.get(kind) is not None]
    if len(forms) > 1 or (beside and forms not in ([], ["text"])) or not (forms or beside):
        expected = "one of text, parts, messages; or image, video, audio with or without text"
        raise Rejected("schema", f"found {_fields([*forms, *beside] or record)}, expected {expected}")
    if forms in ([], ["text"]):
        texts = [Part("text", text=_string(record["text"], "text"))] if forms else []
        parts: tuple[Part, ...] = (*(part for kind in beside for part in _beside(kind, record[kind])), *texts)
    elif forms == ["parts"]:
        parts = tuple(_part(part, f"parts[{i}]", True) for i, part in enumerate(_list(record["parts"], "parts")))
    else:
        messages = [_message(message, i) for i, message in enumerate(_list(record["messages"], "messages"))]
        for before, message in itertools.pairwise(messages):
            message[0] = replace(message[0], new_turn=message[0].role == before[0].role)
        parts = tuple(itertools.chain.from_iterable(messages))
    with_role = [part.role is not None for part in parts]
    if any(with_role) and not all(with_role):
        raise Rejected("schema", f"parts[{with_role.index(False)}].role: missing, expected one in all parts or in none")
    split = "" if record.get("split") is None else record["split"]
    if split not in ("", *SPLITS):
        raise _wrong("split", split, f"one of {', '.join(SPLITS)}")
    metadata = {} if record.get("metadata") is None else record["metadata"]
    if not isinstance(metadata, Mapping):
        raise _wrong("metadata", metadata, "an object")
    others = {name: value for name, value in record.items() if name not in FIELDS}
    document = Document(
        id=_name(record.get("id"), "id") or default_id,
        parts=parts,
        source=_name(record.get("source"), "source"),
        split=split,
        metadata={**others, **metadata} or None,
    )
    if not with_more and not any(part.text.strip() or part.kind != "text" for part in parts):
        raise Rejected("empty", "found no text but blanks, and no files")
    return document


def with_files(document: Document, read: Callable[[str], bytes]) -> Document:
    """The document with the bytes of its files; `read` gives those of a path, or raises `Rejected`."""
    if all(part.data or part.kind == "text" for part in document.parts):
        return document
    parts = tuple(replace(part, data=read(part.path)) if part.path else part for part in document.parts)
    return replace(document, parts=parts)


def _beside(kind: Kind, value: Any) -> list[Part]:
    """The files of a field `image`, `video` or `audio`: a path, bytes, a map with one of these, or a list of such."""
    parts = []
    for i, entry in enumerate(value if isinstance(value, list) else [value]):
        name = f"{kind}[{i}]" if isinstance(value, list) else kind
        data = entry.get("bytes") if isinstance(entry, Mapping) else entry if isinstance(entry, bytes) else None
        path = entry.get("path") if isinstance(entry, Mapping) else entry
        if data is not None:
            parts.append(Part(kind, data=_bytes(data, name)))
        elif isinstance(path, str) and path:
            parts.append(Part(kind, path=_string(path, name)))
        else:
            raise _wrong(name, entry, "the path of a file, or a map with path or bytes")
    return parts


def _message(message: Any, i: int) -> list[Part]:
    name = f"messages[{i}]"
    if not isinstance(message, Mapping):
        raise _wrong(name, message, "an object with role and content")
    _present(message, {"role", "content", "weight"}, name)
    role, weight = _role(message.get("role"), f"{name}.role"), _weight(message.get("weight"), f"{name}.weight")
    if role is None:
        raise _wrong(f"{name}.role", None, f"one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        return [Part("text", text=_string(content, f"{name}.content"), role=role, weight=weight)]
    parts = [_part(part, f"{name}.content[{k}]", False) for k, part in enumerate(_list(content, f"{name}.content"))]
    return [
        replace(part, role=role, weight=weight if part.weight is None and part.kind == "text" else part.weight)
        for part in parts
    ]


def _part(part: Any, name: str, with_role: bool) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", *MEDIA):
        found = kind if isinstance(part, Mapping) else part
        raise _wrong(f"{name}.type" if isinstance(part, Mapping) else name, found, f"one of text, {', '.join(MEDIA)}")
    known = {"type", *(("text", "weight") if kind == "text" else ("path", "data")), *(("role",) if with_role else ())}
    present = _present(part, known, name)
    role = _role(part.get("role"), f"{name}.role")
    if kind == "text":
        text = _string(part.get("text"), f"{name}.text")
        return Part("text", text=text, role=role, weight=_weight(part.get("weight"), f"{name}.weight"))
    if len(present & {"path", "data"}) != 1:
        raise Rejected("schema", f"{name}: found {_fields(present)}, expected exactly one of path, data")
    if "path" in present:
        path = _string(part["path"], f"{name}.path")
        if not path:
            raise _wrong(f"{name}.path", path, "the path of a file")
        return Part(kind, path=path, role=role)
    return Part(kind, data=_bytes(part["data"], f"{name}.data"), role=role)


def _present(fields: Mapping[str, Any], known: set[str], name: str) -> set[str]:
    """Names of the fields that are there, all of them known. What a table leaves empty in a column is not there."""
    present = {key for key, value in fields.items() if value is not None}
    if unknown := sorted(map(str, present - known)):
        raise Rejected("schema", f"{name}: found the unknown field {unknown[0]}, expected of {sorted(known)}")
    return present


def _bytes(value: Any, name: str) -> bytes:
    """Bytes as they are in a table, or in base64 as in JSON."""
    if isinstance(value, str):
        try:
            if len(value) % 4:  # Python takes one = too many
                raise ValueError
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise Rejected("schema", f"{name}: found no base64") from None
    if not isinstance(value, bytes) or not value:
        raise _wrong(name, value, "the bytes of a file in base64")
    return value


def _role(value: Any, name: str) -> str | None:
    if value is not None and value not in ROLES:
        raise _wrong(name, value, f"one of {', '.join(ROLES)}")
    return value


def _weight(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST_WEIGHT:
        raise _wrong(name, value, f"a number from 0 to {LARGEST_WEIGHT:,.0f}")
    return float(value)


def _name(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():  # what becomes of whole numbers in a column with gaps
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):  # ids often are numbers
        value = str(value)
    text = _string(value, name)
    if not 0 < len(text) <= LONGEST_NAME:
        raise Rejected("schema", f"{name}: found {len(text)} characters, expected 1 to {LONGEST_NAME}")
    return text


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Rejected("utf-8", f"{name}: found half a surrogate pair at character {error.start}") from None
    return value


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise _wrong(name, value, "a list with at least one entry")
    return value


def _wrong(name: str, found: Any, expected: str) -> Rejected:
    shown = repr(found) if isinstance(found, str | int | float | bool | None) else f"a {type(found).__name__}"
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    if isinstance(found, list | bytes | Mapping) and not found:
        shown = f"an empty {type(found).__name__}"
    return Rejected("schema", f"{name}: found {shown}, expected {expected}".removeprefix(": "))


def _fields(names: Any) -> str:
    listed = ", ".join(sorted(map(str, names))[:8])
    return f"the fields {listed}" if listed else "no fields"
