"""A prepared document: its bytes in a shard, and the facts that the index has of it.

A record is a msgpack map: `tokens` (little endian, unsigned), `weights` as runs, `files` in their order, and what the
maker of the data said of it. Files are kept as they came; how they become tiles, frames and windows is decided by the
configuration of a run, from the facts in the index.
"""

import datetime
import decimal
import hashlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgpack
import numpy as np

from data.audio import read_audio
from data.chat import Message, chat_pieces
from data.documents import MEDIA, Document, Kind, Part, Rejected
from data.files import MB, too_large
from data.images import read_image
from data.sequence import End, Piece, Text, Token, encode
from data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, Tokenizer
from data.video import probe_video
from sharding.errors import UserError

FACTS = 3
"""Whole numbers that the index keeps of a file: height and width in pixels of an image; milliseconds, height and width of a
video; samples at 16 kHz of a sound."""
DIGEST_BYTES = 16
TEXT_BYTES = 8 * MB
"""Of the texts of a document. Encoding a text takes some 130 times its size."""


class File(NamedTuple):
    """An image, a video or a sound of a document."""

    kind: Kind
    at: int
    """Tokens of the document's text before it."""
    data: bytes
    """As it came: a JPEG, a WAV, ..."""


class Record(NamedTuple):
    """A document as it lies in a shard."""

    id: str
    source: str
    tokens: np.ndarray
    """int32 [n], of its text: begin-of-text first. What stands for files is not among them."""
    weights: np.ndarray
    """float32 [n], of each token as a target."""
    files: tuple[File, ...]
    metadata: Mapping[str, Any] | None
    where: str
    """File and line, row or member that it was read from."""


class Entry(NamedTuple):
    """What the index has of a document."""

    tokens: int
    kinds: tuple[int, ...]
    """Of its files, as places in `MEDIA`."""
    places: tuple[int, ...]
    """Tokens of text before each file."""
    facts: tuple[tuple[int, ...], ...]
    """`FACTS` numbers of each file."""
    split: int
    """0: decided by the hash of the id; 1 train, 2 held out."""
    source: str
    id_digest: bytes
    content_digest: bytes
    """Over roles, texts and the bytes of files, not over id, source and metadata."""
    nbytes: int
    """Of the record."""


def prepared(
    document: Document, where: str, tokenizer: Tokenizer, dtype: np.dtype, most: int | None = None
) -> tuple[bytes, Entry]:
    """The record of a document whose files have been read, and its entry in the index.

    Raises:
        Rejected: a file cannot be decoded, the texts are too large, or the files have more than `most` bytes in all.
    """
    size = sum(len(part.data) for part in document.parts)
    if most is not None and size > most:
        raise too_large("the files of the record", size, most)
    if (size := sum(len(part.text.encode()) for part in document.parts)) > TEXT_BYTES:
        raise Rejected(
            "too large", f"found {size:,} bytes of text, expected at most {TEXT_BYTES:,}. Cut it into parts."
        )
    parts = [part for part in document.parts if part.kind != "text"]
    facts = tuple(facts_of(part, f"number {i + 1}") for i, part in enumerate(parts))
    encoded = encode(tokenizer, _pieces(document))
    record = {
        "id": document.id,
        "source": document.source,
        "tokens": np.asarray(encoded.ids, dtype).tobytes(),
        "weights": _runs(encoded.weights),
        "files": [[part.kind, at, part.data] for (at, _), part in zip(encoded.files, parts, strict=True)],
        "metadata": document.metadata,
        "where": where,
    }
    try:
        packed: bytes = msgpack.packb(record, default=_plain)  # pyright: ignore[reportAssignmentType]
    except (OverflowError, ValueError, TypeError) as error:
        raise Rejected(
            "schema", f"metadata: {error}, expected what JSON can hold, and whole numbers of 64 bits"
        ) from None
    return packed, Entry(
        tokens=len(encoded.ids),
        kinds=tuple(MEDIA.index(part.kind) for part in parts),
        places=tuple(at for at, _ in encoded.files),
        facts=facts,
        split=("", "train", "heldout").index(document.split),
        source=document.source,
        id_digest=_digest([document.id.encode()]),
        content_digest=_digest(_content(document)),
        nbytes=len(packed),
    )


def unpacked(data: bytes, dtype: np.dtype) -> Record:
    """The record of these bytes."""
    fields = msgpack.unpackb(data)
    tokens = np.frombuffer(fields["tokens"], dtype).astype(np.int32)
    counts, values = fields["weights"]
    weights = np.repeat(np.asarray(values, np.float32), counts)
    files = tuple(File(*file) for file in fields["files"])
    return Record(fields["id"], fields["source"], tokens, weights, files, fields["metadata"], fields["where"])


def _pieces(document: Document) -> Iterator[Piece]:
    """Texts and places of files. Text parts are encoded apart from each other, but for those of one turn."""
    numbers = iter(range(len(document.parts)))
    if document.conversation:
        yield from chat_pieces(_turns(document, numbers), weights=True)
        return
    yield Token(BEGIN_OF_TEXT)
    for part in document.parts:
        if part.kind == "text":
            yield Text(part.text, 1.0 if part.weight is None else part.weight)
            yield End()
        else:
            yield End(next(numbers))
    last = document.parts[-1]
    yield Token(END_OF_TEXT, 1.0 if last.weight is None else last.weight)


def _turns(document: Document, numbers: Iterator[int]) -> list[Message]:
    """Neighbouring parts of one role are one turn, but for those of another message."""
    turns: list[tuple[str, list[str | Piece]]] = []
    for part in document.parts:
        role = part.role or ""
        if not turns or turns[-1][0] != role or part.new_turn:
            turns.append((role, []))
        usual = 1.0 if role == "assistant" else 0.0
        weight = usual if part.weight is None else part.weight
        turns[-1][1].append(Text(part.text, weight) if part.kind == "text" else End(next(numbers)))
    return [Message(role, content) for role, content in turns]


def facts_of(part: Part, name: str) -> tuple[int, ...]:
    """What an index keeps of a file; raises `Rejected` if it cannot be decoded."""
    try:
        found = _PROBES[part.kind](part.data, part.path or name)
    except UserError as error:
        raise Rejected("file", str(error)) from None
    return (*found, *(0,) * (FACTS - len(found)))


def _image_facts(data: bytes, name: str) -> tuple[int, ...]:
    image = read_image(data, name)
    return image.height, image.width


def _audio_facts(data: bytes, name: str) -> tuple[int, ...]:
    return (len(read_audio(data, name)),)


def _video_facts(data: bytes, name: str) -> tuple[int, ...]:
    found = probe_video(data, name)
    return found.duration_ms, found.height, found.width


_PROBES: dict[Kind, Callable[[bytes, str], tuple[int, ...]]] = {
    "image": _image_facts,
    "video": _video_facts,
    "audio": _audio_facts,
}


def _plain(value: Any) -> Any:
    """What a table has in its columns and JSON has not, as JSON files have it."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"found a {type(value).__name__}")


def _runs(weights: np.ndarray) -> tuple[list[int], list[float]]:
    """(lengths, values) of the runs of equal weights."""
    starts = np.flatnonzero(np.diff(weights, prepend=np.nan) != 0)
    return np.diff(starts, append=len(weights)).tolist(), weights[starts].tolist()


def _content(document: Document) -> Iterator[bytes]:
    for part in document.parts:
        yield f"{part.kind} {part.role} {part.weight}{' new turn' if part.new_turn else ''}".encode()
        yield part.text.encode() if part.kind == "text" else part.data


def _digest(contents: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()
