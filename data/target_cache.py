"""A teacher's targets on disk, found again by the digest of a segment. `docs/TARGET_CACHE.md` has the format.

CACHE/header.json           whose targets of what, and how they were drawn
CACHE/NNNNNN.array_record   a shard of records, in the order in which they were written
CACHE/NNNNNN.index          its index; a shard without one is unfinished, and does not count
CACHE/NNNNNN.json           what it took to make it, if that is known
"""

import contextlib
import hashlib
import json
import os
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from data.open_files import check_limit, limit
from data.target_index import SUFFIX, Cost, Progress, Segments, ShardIndex, sync_folder
from data.target_records import DIGEST_BYTES, Damaged, RecordFormat, Targets, decode
from sharding.errors import UserError

FORMAT = 1
OPEN_SHARDS = 128
"""That a reader keeps open, each with a file descriptor; not more than a quarter of the files that the process may have."""
NOTES = 5
"""Missing segments that a reader names, and as many damaged records."""


class Lack(StrEnum):
    """Why there are no targets of a segment."""

    MISSING = "missing"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class Header:
    """What all targets of a cache have in common."""

    teacher: Mapping[str, Any]
    """Who it is: the digest of its weights or the step of its checkpoint, ...; and its name, which may change."""
    tokenizer: str
    """Its digest."""
    vocab_size: int
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """What decides how documents become what a model is fed."""
    draws: int = 0
    """Of each token; 0 with `top_k`."""
    top_k: int = 0
    temperature: float = 1.0
    """Of the teacher's distribution that the targets are of."""
    proposal: float = 1.0
    """Draws come from that distribution to this power; unless it is 1, records have importance weights."""
    cut: Mapping[str, Any] = field(default_factory=dict)
    """Options of the data that decide where documents too long for a row are cut."""

    @property
    def record_format(self) -> RecordFormat:
        weighted = self.top_k > 0 or self.proposal != 1
        return RecordFormat(self.vocab_size, self.draws, self.top_k, weighted)

    @property
    def recipe(self) -> bytes:
        """How targets are drawn, for `token_keys`."""
        names = ("draws", "proposal", "temperature", "top_k")
        return _canonical({name: getattr(self, name) for name in names})

    @property
    def segment_recipe(self) -> bytes:
        """How documents become what a model is fed, for `segment_digests`."""
        return _canonical({"preprocessing": dict(self.preprocessing), "tokenizer": self.tokenizer})

    @property
    def digest(self) -> bytes:
        """Of all fields."""
        return hashlib.blake2b(_canonical(asdict(self)), digest_size=DIGEST_BYTES).digest()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The header of a cache.

        Raises:
            UserError: there is none, or it is damaged or of a newer format.
        """
        path = folder / "header.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            found, checksum = fields.pop("format"), fields.pop("checksum")
            if isinstance(found, int) and found > FORMAT:
                raise UserError(f"{path}: found format {found}, expected at most {FORMAT}. Use a newer Drover.")
            header = cls(**fields)
            if found != FORMAT or header.digest.hex() != checksum:
                raise ValueError("the checksum does not fit the fields")
            _ = header.record_format  # raises ValueError for what cannot be
        except FileNotFoundError:
            raise UserError(
                f"{folder}: found no header.json, expected a cache of targets. `drover teach --out {folder}` makes one."
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            check_limit(path, error)
            raise UserError(f"{path}: cannot be read ({error}). Copy it again.") from error
        return header

    def write(self, folder: Path) -> "Header":
        """Writes it into a folder, unless there is one: then that must be the same, but for the teacher's name.

        Returns:
            What the folder has.

        Raises:
            UserError: the folder has another one.
        """
        path = folder / "header.json"
        if not path.exists():
            text = json.dumps({"format": FORMAT, **asdict(self), "checksum": self.digest.hex()}, indent=2)
            beside = folder / f".header.json.{os.getpid()}.{os.urandom(4).hex()}"
            with beside.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(beside, path)  # unlike a rename, never over that of another process
            except (FileExistsError, FileNotFoundError):  # another was faster, and may have removed this as a leftover
                pass
            except OSError:  # a file system without links
                os.replace(beside, path)
            beside.unlink(missing_ok=True)
            sync_folder(folder)
        found = self.read(folder)
        if difference := _difference(found, self):
            raise UserError(f"{path}: {difference}. The cache was begun for something else: give another folder.")
        return found


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _difference(found: Header, expected: Header) -> str:
    """Where they differ, in words; a teacher with another name is the same."""

    def compared(header: Header) -> dict[str, bytes]:
        fields = asdict(header)
        fields["teacher"] = {name: value for name, value in fields["teacher"].items() if name != "name"}
        return {name: _canonical(value) for name, value in fields.items()}

    ours, theirs = compared(found), compared(expected)
    return "; ".join(
        f"{name}: found {getattr(found, name)!r}, expected {getattr(expected, name)!r}"
        for name in ours
        if ours[name] != theirs[name]
    )


def finished_shards(folder: Path, cache: bytes) -> list[tuple[Path, ShardIndex]]:
    """The finished shards of a folder, by number.

    Raises:
        UserError: one is missing, truncated, damaged or of another cache.
    """
    found = []
    try:
        paths = [path for path in folder.iterdir() if re.fullmatch(r"\d{6,}" + re.escape(SUFFIX), path.name)]
    except OSError as error:
        check_limit(folder, error)
        raise UserError(f"{folder}: cannot be listed ({error}). Give the same command again when it can.") from error
    for path in sorted(paths, key=lambda path: int(path.stem)):
        index, shard = ShardIndex.open(path), path.with_suffix(".array_record")
        again = f"Copy it again; or remove it and {path.name}, and `drover teach` makes them again."
        if index.facts.cache != cache:
            raise UserError(f"{path}: is of another cache than {folder / 'header.json'}. Remove it and {shard.name}.")
        try:
            size = shard.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{shard}: is missing, though its index is there. {again}") from None
        except OSError as error:
            check_limit(shard, error)
            raise UserError(f"{shard}: cannot be read ({error}). Give the same command again when it can.") from error
        if size != index.facts.file_bytes:
            raise UserError(f"{shard}: found {size:,} bytes, expected {index.facts.file_bytes:,}. {again}")
        found.append((shard, index))
    return found


class TargetCache:
    """Reads a cache. Use it in a `with`, or close it. Threads may share it.

    Attributes:
        header: of the cache.
        cut_otherwise: how the cache's `cut` differs from the student's, in words; empty if it does not.
    """

    def __init__(
        self,
        folder: Path,
        missing: Literal["fail", "hard"] = "fail",
        *,
        tokenizer: str | None = None,
        teacher: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        cut: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
    ):
        """
        Args:
            folder: of the cache.
            missing: whether a segment that is missing or damaged raises, or is answered with its `Lack`.
            tokenizer: digest of the one that the student has.
            teacher: `name` and `digest` of the one whose cache it has to be; names may differ.
            preprocessing: of the student's data.
            cut: of the student's data; may differ, since only long documents are then other segments.
            vocab_size: of the student.

        Raises:
            UserError: the cache is not what was expected, or is missing or damaged.
        """
        self.header = header = Header.read(folder)
        self._folder, self._missing, self._form = folder, missing, header.record_format
        path = folder / "header.json"
        if tokenizer is not None and tokenizer != header.tokenizer:
            raise UserError(
                f"{path}: tokenizer: found {header.tokenizer}, expected {tokenizer}, that of the student's data. Teacher and "
                "student need the same one."
            )
        if teacher and teacher["digest"] != header.teacher.get("digest"):
            theirs, ours = (f"{one.get('name')} ({one.get('digest')})" for one in (header.teacher, teacher))
            raise UserError(
                f"{path}: teacher: found {theirs}, expected {ours}, which is distill.teacher. Name the teacher whose cache it "
                "is, or none (distill.teacher=''), or let `drover teach` fill another folder."
            )
        if preprocessing is not None and _canonical(dict(preprocessing)) != _canonical(dict(header.preprocessing)):
            raise UserError(
                f"{path}: preprocessing: found {dict(header.preprocessing)}, expected {dict(preprocessing)}. No segment "
                "would be found: use the teacher's options of the data, or make a cache with these."
            )
        self.cut_otherwise = "; ".join(
            f"data.{name}: found {value}, expected {header.cut.get(name)} as the cache was made with"
            for name, value in (cut or {}).items()
            if value != header.cut.get(name)
        )
        shards = finished_shards(folder, header.digest)
        self._shards = [(shard, index.facts) for shard, index in shards]
        for shard, facts in self._shards:
            if vocab_size is not None and facts.largest_id >= vocab_size:
                raise UserError(
                    f"{shard}: holds id {facts.largest_id:,}, expected ids below the student's vocab_size of "
                    f"{vocab_size:,}. Raise it to the teacher's {header.vocab_size:,}."
                )
        self._segments = Segments([index for _, index in shards])
        self._lock, self._closed = threading.Lock(), False
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._notes: deque[str] = deque()
        self._unnamed = dict.fromkeys(Lack, NOTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            while self._readers:
                _close(self._readers.popitem()[1])

    def take_notes(self) -> list[str]:
        """Names what was missing or damaged since the last call, of each kind the first `NOTES`. Does not wait for `get`."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    @property
    def progress(self) -> Progress:
        """What it holds."""
        return Progress.of([facts for _, facts in self._shards])

    @property
    def cost(self) -> Cost:
        """What it took to make it; raises `UserError` where a file that says so is damaged."""
        return Cost.of(self._shards)

    def get(self, digests: Sequence[bytes]) -> list[Targets | Lack]:
        """The targets of these segments; with `missing` "hard", why there are none.

        Raises:
            UserError: with `missing` "fail", a segment is missing or its record damaged; with any, a record cannot be read
                for a reason that is not in its file, like too many open files.
            ValueError: the cache is closed.
        """
        with self._lock:
            if self._closed:
                raise ValueError(f"{self._folder}: the cache is closed")
            return self._get(digests)

    def _get(self, digests: Sequence[bytes]) -> list[Targets | Lack]:
        shards, places = self._segments.find(digests)
        absent = np.flatnonzero(shards < 0)
        if absent.size and self._missing == "fail":
            cause = "Was it made from the same data, with the same preprocessing, to the end?"
            if self.cut_otherwise:
                cause = f"Long documents are cut in other places ({self.cut_otherwise}): make these options the same."
            raise UserError(
                f"{self._folder}: has no targets for segment {digests[absent[0]].hex()}, and {absent.size:,} of "
                f"{len(digests):,} asked for. {cause} `drover teach` goes on with it; or let missing segments fall back to "
                "hard targets."
            )
        for i in absent.tolist():
            self._note(Lack.MISSING, f"{self._folder}: has no targets for segment {digests[i].hex()}")
        found: list[Targets | Lack] = [Lack.MISSING] * len(digests)
        for shard in np.unique(shards[shards >= 0]).tolist():
            wanted = np.flatnonzero(shards == shard).tolist()
            records = self._read(shard, [int(places[i]) for i in wanted])
            for i, record in zip(wanted, records, strict=True):
                try:
                    if isinstance(record, Exception):
                        raise Damaged(str(record))
                    found[i] = decode(record, self._form, digests[i])
                except Damaged as error:
                    note = f"{self._shards[shard][0]}: record {places[i]} is damaged ({error})"
                    if self._missing == "fail":
                        raise UserError(
                            f"{note}. Copy the file again; or remove it and its index, and `drover teach` makes them again; "
                            "or let damaged records fall back to hard targets."
                        ) from error
                    self._note(Lack.DAMAGED, note)
                    found[i] = Lack.DAMAGED
        return found

    def _read(self, shard: int, places: list[int]) -> list[bytes | Exception]:
        try:
            return self._reader(shard).read(places)
        except Exception as error:  # whatever the library makes of damaged bytes
            check_limit(self._shards[shard][0], error)
            if len(places) == 1:
                return [error]
        return [record for place in places for record in self._read(shard, [place])]  # the others may be whole

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader

            while len(self._readers) >= max(min(OPEN_SHARDS, limit() // 4), 1):
                _close(self._readers.popitem(last=False)[1])
            self._readers[shard] = ArrayRecordReader(str(self._shards[shard][0]), "readahead_buffer_size:0")
        self._readers.move_to_end(shard)
        return self._readers[shard]

    def _note(self, lack: Lack, text: str) -> None:
        if self._unnamed[lack]:
            self._unnamed[lack] -= 1
            last = "" if self._unnamed[lack] else f"; others that are {lack} are counted, and not named"
            self._notes.append(f"{text}{last}")


def _close(reader: Any) -> None:
    with contextlib.suppress(RuntimeError):  # of a damaged shard, which reading has told of
        reader.close()


def describe(folder: Path) -> dict[str, Any]:
    """What a cache holds, in numbers.

    Raises:
        UserError: there is none, or it is damaged.
    """
    header = Header.read(folder)
    shards = finished_shards(folder, header.digest)
    facts = [index.facts for _, index in shards]
    progress, cost = Progress.of(facts), Cost.of([(shard, index.facts) for shard, index in shards])
    pairs = [np.column_stack([index.high, index.low]) for _, index in shards]
    distinct = len(np.unique(np.concatenate(pairs), axis=0)) if pairs else 0
    tokens = np.concatenate([np.zeros(0, np.uint32), *(index.tokens for _, index in shards)])
    finished = {shard.name for shard, _ in shards}
    index_bytes = sum(shard.with_suffix(SUFFIX).stat().st_size for shard, _ in shards)
    file_bytes = sum(f.file_bytes for f in facts) + index_bytes
    return {
        "teacher": dict(header.teacher),
        "tokenizer": header.tokenizer,
        "vocabulary": header.vocab_size,
        "recipe": json.loads(header.recipe),
        "preprocessing": dict(header.preprocessing),
        "cut": dict(header.cut),
        "segments": distinct,
        "repeated segments": progress.records - distinct,
        "tokens": progress.tokens,
        "tokens of a segment": {
            name: round(float(value), 1)
            for name, value in zip(("least", "median", "most"), np.quantile(tokens, (0, 0.5, 1)), strict=True)
        }
        if len(tokens)
        else {},
        "ids of a token": round(sum(f.ids for f in facts) / max(progress.tokens, 1), 2),
        "bytes of records": progress.bytes,
        "bytes of files": file_bytes,
        "bytes of a token": round(file_bytes / max(progress.tokens, 1), 2),
        "shards": len(shards),
        "device seconds": round(cost.device_seconds, 1),
        "tokens of known cost": cost.tokens,
        "unfinished shards": sum(path.name not in finished for path in folder.glob("[0-9]*.array_record")),
    }
