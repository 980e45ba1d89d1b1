"""Makes a prepared data set: shards of tokenised documents with their files, and the index of their lengths.

    DIR/dataset.json     what it holds and how it was made; written last, so that a folder without it is unfinished
    DIR/tokenizer.json   what its texts were encoded with
    DIR/shards/          one ArrayRecord file for each unit of the input
    DIR/index/           an array for each fact of the documents
    DIR/rejected.jsonl   what could not be used, and why: read = written + rejected

The units are prepared in parallel (`data.prepare_unit`) and kept as they are finished, so the same command goes on where it
was stopped. What comes out does not depend on the number of workers, nor on interruptions.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import formats
from data.documents import Rejected
from data.files import shown
from data.filters import TRANSFORMS, load_classifier
from data.index import FORMAT, Index, Part, write_json
from data.prepare_unit import Progress, prepare_unit, start, token_dtype, use
from data.shards import Shards
from data.tokenizer import SMALLEST_BPE, Tokenizer, load_bytes, load_file, train_bpe
from data.units import Unit
from sharding.errors import UserError

SAMPLE_CHARACTERS = 30_000_000
"""Characters of text that a tokenizer is trained on, taken from all units alike."""
_SECONDS_BETWEEN_TELLS = 0.5


@dataclass(frozen=True)
class Options:
    """How documents are prepared."""

    tokenizer: str = "bpe"
    """bpe, bytes or a path, as `data.tokenizer`."""
    tokenizer_size: int = 8192
    """Tokens of a bpe that is trained here."""
    held_out: float = 0.005
    """Share of the documents that is held out, by the hash of the id, where they do not say."""
    max_record_mb: float = 64.0
    """Largest record, its files included."""
    filters: tuple[tuple[str, float], ...] = ()
    transforms: tuple[str, ...] = ()
    classifier: str = ""
    keep_duplicates: bool = False
    """Keep documents whose content is that of an earlier one."""

    @property
    def most(self) -> int:
        """Bytes of the largest record."""
        return int(self.max_record_mb * 10**6)

    def check(self) -> None:
        """Raises `UserError` for a value that cannot be."""
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out: found {self.held_out}, expected a share from 0 to below 1")
        if not (self.max_record_mb > 0 and math.isfinite(self.max_record_mb)):
            raise UserError(f"--max-record-mb: found {self.max_record_mb}, expected a number above 0")
        if self.tokenizer == "bpe" and self.tokenizer_size < SMALLEST_BPE:
            raise UserError(
                f"--tokenizer-size: found {self.tokenizer_size}, expected {SMALLEST_BPE} or more (every byte and the special "
                "tokens). Raise it, or give --tokenizer bytes."
            )
        if unknown := [name for name in self.transforms if name not in TRANSFORMS]:
            raise UserError(f"--transform: found {unknown[0]!r}, expected one of {', '.join(TRANSFORMS)}")
        if self.classifier:
            load_classifier(self.classifier)


@dataclass(frozen=True)
class Told:
    """How far it is."""

    done: int
    total: int
    """Bytes of the input."""
    read: int
    rejected: int
    """Records."""
    doing: str = "preparing"
    """For a tokenizer, all of the input may be gone through before."""


def prepare(
    sources: Sequence[Path], out: Path, options: Options, workers: int, tell: Callable[[Told], None]
) -> dict[str, Any]:
    """Prepares the sources into `out`, or goes on with it; returns what dataset.json says.

    Raises:
        UserError: a source or an option cannot be used, or `out` is finished or something else.
    """
    options.check()
    if (out / "dataset.json").exists():
        shutil.rmtree(out / "unfinished", ignore_errors=True)  # it may have been stopped with nothing else to do
        raise UserError(f"--out {out}: is finished already. Give a new folder, or remove this one.")
    for source in sources:
        if source.is_dir() and source.resolve() in (out.resolve(), *out.resolve().parents):
            raise UserError(
                f"--out {out}: lies in the source {source}, and would be read with it. Give another folder."
            )
    units = formats.plan(sources)
    if not units:
        raise UserError(f"{', '.join(map(str, sources))}: found no files to read, or no records in them.")
    inputs = [_state(path) for unit in units for path in _files(unit)]
    inputs += [_state(Path(options.classifier.rpartition(":")[0]))] if options.classifier else []
    work = _begin(out, units, inputs, options)
    with _alone(out, work):
        try:
            tokenizer = _tokenizer(out, units, options, tell)
        except OSError as error:
            raise _unwritable(out, error) from error
        _prepare_units(work, units, options, tokenizer, workers, tell)
        beside = {shown(str(source)): count for source in sources if (count := formats.beside_records(source))}
        names = [shown(str(source.resolve())) for source in sources]
        return _finish(out, names, len(units), options, tokenizer, beside)


def prepare_built_in(
    name: str, units: Sequence[Unit], tokenizer: Tokenizer, out: Path, workers: int, tell: Callable[[Told], None]
) -> None:
    """Prepares a built-in source into `out`, unless that is done, or goes on with it. One process does, others wait.

    Raises:
        UserError: `out` cannot be written.
    """
    options = Options(tokenizer.digest, held_out=0, keep_duplicates=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.with_name(f".{out.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (out / "dataset.json").exists():
                work = _begin(out, units, [], options)
                _write_text(out / "tokenizer.json", tokenizer.serialised)
                _prepare_units(work, units, options, tokenizer, workers, tell)
                _finish(out, [name], len(units), options, tokenizer, {})
    except OSError as error:
        raise _unwritable(out, error) from error


def _begin(out: Path, units: Sequence[Unit], inputs: Any, options: Options) -> Path:
    """The folder of what is unfinished; checks that an earlier start was the same."""
    work = out / "unfinished"
    plan = hashlib.sha256(json.dumps([FORMAT, units, inputs, dataclasses.asdict(options)]).encode()).hexdigest()
    try:
        if out.exists() and not work.exists() and any(out.iterdir()):
            raise UserError(f"--out {out}: holds something else. Give a new folder.")
        for folder in (work, out / "shards"):
            folder.mkdir(parents=True, exist_ok=True)
        stored = work / "plan"
        if not stored.exists():
            _write_text(stored, plan)
        elif stored.read_text() != plan:
            raise UserError(
                f"--out {out}: was begun with other options, or the input has changed since. Give the same, or remove it."
            )
    except OSError as error:
        raise _unwritable(out, error) from error
    return work


@contextlib.contextmanager
def _alone(out: Path, work: Path) -> Iterator[None]:
    """Keeps other commands from preparing into the same folder meanwhile."""
    try:
        lock = (work / "lock").open("w")
    except OSError as error:
        raise _unwritable(out, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {out}: another command prepares into it. Wait for it, or give another folder."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def _files(unit: Unit) -> list[Path]:
    return [Path(unit.path, name) for group in unit.groups for name in group] or [Path(unit.path)]


def _state(path: Path) -> tuple[int, int]:
    """Changes when the file does."""
    status = path.lstat()
    return status.st_size, status.st_mtime_ns


def _tokenizer(out: Path, units: Sequence[Unit], options: Options, tell: Callable[[Told], None]) -> Tokenizer:
    path = out / "tokenizer.json"
    if path.exists():
        return load_file(path)
    if options.tokenizer == "bytes":
        tokenizer = load_bytes()
    elif options.tokenizer == "bpe":
        tokenizer = train_bpe(_sample(units, options, tell), options.tokenizer_size)
    else:
        try:
            tokenizer = load_file(options.tokenizer)
        except UserError as error:
            raise UserError(f"--tokenizer (bpe, bytes or a path): {error}") from error
    _write_text(path, tokenizer.serialised)
    return tokenizer


def _sample(units: Sequence[Unit], options: Options, tell: Callable[[Told], None]) -> list[str]:
    """Texts of the input, of every unit as many characters at most. Media are not read."""
    share = SAMPLE_CHARACTERS // len(units) + 1
    texts = []
    done, total, read, rejected, told = 0, sum(unit.nbytes for unit in units), 0, 0, -math.inf
    for unit in units:
        left = share
        for found in formats.read(unit, options.most, media=False):
            read += found.records
            if time.monotonic() - told > _SECONDS_BETWEEN_TELLS:
                told = time.monotonic()
                now = done + int(unit.nbytes * min(found.share, 1))
                tell(Told(now, total, read, rejected, "reading texts for the tokenizer"))
            if isinstance(found.document, Rejected):
                rejected += found.records
                continue
            for part in found.document.parts:
                texts += _cut(part.text[:left])
                left -= min(left, len(part.text))
            if left <= 0:
                break
        done += unit.nbytes
    tell(Told(total, total, read, rejected, "training the tokenizer"))
    if not any(texts):
        raise UserError("--tokenizer bpe: found no text to train it on. Give --tokenizer bytes, or the path of one.")
    return texts


def _cut(text: str) -> Iterator[str]:
    """The text, cut within what would be a word of thousands of characters (base64, DNA): the time that a bpe is trained
    for grows with the square of the longest one."""
    start = 0
    for run in re.finditer(r"\S{1000}|\s{1000}", text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _prepare_units(
    work: Path,
    units: Sequence[Unit],
    options: Options,
    tokenizer: Tokenizer,
    workers: int,
    tell: Callable[[Told], None],
) -> None:
    """Prepares every unit that is not finished, `workers` of them at a time; 0 for one after the other in this process."""
    context = multiprocessing.get_context("spawn")  # a forked child would share locks with the parent's threads
    progress = Progress(context, len(units))
    for i in range(len(units)):
        if Part.exists(work, i):
            progress.table[i] = units[i].nbytes, *Part.counts(work, i)
    total = sum(unit.nbytes for unit in units)

    def told() -> None:
        done, read, rejected = progress.table.sum(axis=0).tolist()
        tell(Told(done, total, read, rejected))

    told()
    left = [i for i in range(len(units)) if not Part.exists(work, i)]
    if not left:
        return
    if not workers:
        use(work, options, tokenizer, progress)
        for i in left:
            prepare_unit(i, units[i])
            told()
        return
    arguments = (work, options, tokenizer, progress)
    others = set(multiprocessing.active_children())
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(left)), context, start, arguments) as pool:
        running = {pool.submit(prepare_unit, i, units[i]) for i in left}
        try:
            while running:
                done, running = concurrent.futures.wait(
                    running, _SECONDS_BETWEEN_TELLS, concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()
                told()
        except (BrokenProcessPool, MemoryError) as error:
            raise UserError(
                "--workers: a process ended by itself. If memory ran out, give fewer workers or a smaller --max-record-mb. "
                "The same command goes on where it was stopped."
            ) from error
        except OSError as error:
            raise _unwritable(work.parent, error) from error
        finally:
            # After an error, or Ctrl-C, what they are at is not waited for: it is begun again the next time.
            for child in set(multiprocessing.active_children()) - others if running else ():
                child.terminate()
            pool.shutdown(cancel_futures=True)


def _finish(
    out: Path, sources: Sequence[str], units: int, options: Options, tokenizer: Tokenizer, beside: dict[str, int]
) -> dict[str, Any]:
    """Writes the index, what was rejected, and last dataset.json. `beside`: files that only records name, by folder."""
    work = out / "unfinished"
    parts = [Part.read(work, i) for i in range(units)]
    read = sum(Part.counts(work, i)[0] for i in range(units))
    part, dtype = Part.joined(parts), token_dtype(tokenizer.size)
    shards = np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts])
    records = np.concatenate([np.arange(len(p), dtype=np.int32) for p in parts])
    by_id = _repeated(part.id_digests, np.ones(len(part), bool))
    by_content = np.zeros(len(part), bool) if options.keep_duplicates else _repeated(part.content_digests, ~by_id)
    kept = ~by_id & ~by_content
    index = Index.of(part, shards, records, kept, options.held_out)
    try:
        index.write(out / "index")
        rules = Counter[str]()
        with open(work / "rejected.jsonl", "w", encoding="utf-8") as file:
            for line in itertools.chain(
                _rejected(work, units), _duplicates(out, shards, records, by_id, by_content, dtype)
            ):
                rules[line["rule"]] += line.get("records", 1)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(work / "rejected.jsonl", out / "rejected.jsonl")
        facts = {
            "format": FORMAT,
            "sources": list(sources),
            "options": dataclasses.asdict(options),
            "tokenizer": tokenizer.digest,
            "token_dtype": dtype.str,
            "read": read,
            "written": len(index),
            "rejected": dict(rules.most_common()),
            "read_only_if_named": beside,
            "digest": hashlib.sha256(
                part.id_digests[kept].tobytes() + part.content_digests[kept].tobytes() + index.held_out.tobytes()
            ).hexdigest(),
            **index.facts_of(),
        }
        if read != len(index) + sum(rules.values()):
            raise UserError(
                f"{out}: {read:,} records were read, but {len(index):,} are written and {sum(rules.values()):,} rejected: "
                "files of it were lost or changed meanwhile. Remove it, and prepare the data again."
            )
        if not read:
            raise UserError(f"{', '.join(sources)}: found no records.")
        if not len(index):
            raise UserError(
                f"{out}: none of {facts['read']:,} records could be used; {out / 'rejected.jsonl'} says why."
            )
        write_json(out / "dataset.json", facts)
        shutil.rmtree(work)
    except OSError as error:
        raise _unwritable(out, error) from error
    return facts


def _repeated(digests: np.ndarray, among: np.ndarray) -> np.ndarray:
    """bool [N]: those among them whose digest an earlier one has."""
    numbers = np.flatnonzero(among)
    _, first = np.unique(digests[numbers].view(f"V{digests.shape[1]}").ravel(), return_index=True)
    repeated = among.copy()
    repeated[numbers[first]] = False
    return repeated


def _rejected(work: Path, units: int) -> Iterator[dict[str, Any]]:
    for i in range(units):
        with (work / Part.rejections(i)).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _duplicates(
    out: Path, shards: np.ndarray, records: np.ndarray, by_id: np.ndarray, by_content: np.ndarray, dtype: np.dtype
) -> Iterator[dict[str, Any]]:
    numbers = np.flatnonzero(by_id | by_content)
    with Shards(out / "shards", dtype) as reader:
        for n in numbers.tolist():
            [record] = reader.read([(int(shards[n]), int(records[n]))])
            if by_id[n]:
                rule, reason = "duplicate id", f"id: an earlier document has {record.id!r} too"
            else:
                rule, reason = "duplicate", "the content is that of an earlier document (--keep-duplicates keeps it)"
            yield {"where": record.where, "rule": rule, "reason": reason}


def _write_text(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _unwritable(out: Path, error: OSError) -> UserError:
    where = Path(error.filename or out)
    if out.absolute() not in (where.absolute(), *where.absolute().parents):
        return UserError(
            f"{where}: cannot be read ({error.strerror or error}). The same command goes on where it was stopped."
        )
    return UserError(
        f"--out {out}: {where} cannot be written ({error.strerror or error}). Make room, or give another folder; the same "
        "command goes on where it was stopped."
    )
