"""Metrics: from the device to JSON lines and TensorBoard, on a thread of their own, so that a step never waits for them.

`<run>/metrics/metrics.jsonl` has one JSON object per line with at least `kind` ("train", "eval") and `step`. Keys with
the prefix `time/` depend on the clock; all others are reproduced bit for bit by a run that was killed and resumed.

Numbers keep their exact value: a float32 is written as the float64 it equals, in the shortest form that reads back to
it. JSON has no numbers that are not finite, so these are written as the strings "NaN", "Infinity" and "-Infinity", which
`read_metrics` turns back into floats.
"""

import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] (made by protobuf at import)
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] (made by protobuf at import)

from sharding.errors import UserError

FILE_NAME = "metrics.jsonl"
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Record = dict[str, Any]
Observer = Callable[[Record], None]


class Logger(Protocol):
    """What takes records."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...


class NoLogger:
    """Takes records and forgets them, for processes whose leader writes."""

    def write(self, record: Mapping[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass


class MetricsLogger:
    """Takes records from the training loop and writes them in order, on a thread.

    A record is a dict with `kind`, `step` and any metrics: jax arrays (still being computed, of any shape), numpy arrays,
    numbers, strings, and lists of these. The thread waits for the values, appends the line, writes scalars to
    TensorBoard as `<kind>/<key>` (nested values stay in the JSON lines) and calls every observer with the plain record.

    No metric is ever dropped: when `queue_size` records are waiting, `write` waits as well. What fails on the thread is
    raised by the next call of any method, and nothing is written after it: a full disk as a `UserError` that names the
    file, an observer's exception as it is, so an observer can stop the run.

    `resume_step` is the step of the restored checkpoint: later records, which a killed run left behind, are removed. At
    0 nothing was restored and every old record goes. The old file stays whole until its replacement is on disk.
    """

    def __init__(
        self, directory: Path, resume_step: int, observers: Sequence[Observer] = (), queue_size: int = 64
    ) -> None:
        self.path = directory / FILE_NAME
        self._observers = tuple(observers)
        self._queue: queue.Queue[Record | threading.Event | None] = queue.Queue(queue_size)
        self._failure: BaseException | None = None
        self._closed = False
        with _writing(self.path):
            directory.mkdir(parents=True, exist_ok=True)
            _truncate(self.path, resume_step)
            self._lines = self.path.open("ab", buffering=0)
        with _writing(directory):
            # tensorboardX's own writer has a thread that dies silently when the disk is full, and then blocks its
            # caller for ever; its file format is all that is needed here. The process id keeps two starts within one
            # second from overwriting each other's file.
            self._events = EventsWriter(str(directory / "events"), f".{os.getpid()}")
            # TensorBoard hides what earlier files have at this step and later.
            first = resume_step + 1 if resume_step else 0
            start = Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START))
            self._events.write_event(start)
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Hands a record over; its arrays must not be donated or changed afterwards."""
        for value in record.values():
            start_copy = getattr(value, "copy_to_host_async", None)
            if start_copy is not None:  # The copy follows the computation on the device without anyone asking again.
                start_copy()
        self._put(dict(record))

    def flush(self) -> None:
        """Returns when every record written so far is durable (fsync). Call it before a checkpoint is saved, so that a
        checkpoint at step k implies that the metrics up to k are on disk."""
        done = threading.Event()
        self._put(done)
        while not done.wait(0.05):
            self._raise_failure()

    def close(self) -> None:
        """Flushes and ends the thread; raises what `flush` raises. Calling it again does nothing."""
        if self._closed:
            return
        try:
            self.flush()
            self._put(None)
            self._thread.join()
            self._raise_failure()
        finally:
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # The exception that is already leaving matters more.
                raise

    def _put(self, item: Record | threading.Event | None) -> None:
        if self._closed:
            raise ValueError("the metrics logger is closed")
        while True:
            self._raise_failure()
            try:
                return self._queue.put(item, timeout=0.05)
            except queue.Full:
                continue

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with self._lines:
                for item in iter(self._queue.get, None):
                    if isinstance(item, threading.Event):
                        self._sync()
                        item.set()
                    else:
                        record = {key: _plain(value) for key, value in item.items()}
                        self._append(record)
                        for observer in self._observers:
                            observer(record)
            self._events.close()
        except BaseException as error:
            self._failure = error

    def _append(self, record: Record) -> None:
        with _writing(self.path):
            rest = _line(record)
            while rest:  # A disk that is almost full takes a part, and says so at the next attempt.
                rest = rest[self._lines.write(rest) :]
        scalars = [
            Summary.Value(tag=f"{record['kind']}/{key}", simple_value=value)
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float)
        ]
        with _writing(self.path.parent):
            self._events.write_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=scalars)))

    def _sync(self) -> None:
        with _writing(self.path):
            os.fsync(self._lines.fileno())
        with _writing(self.path.parent):
            self._events.flush()


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file, in order. A torn last line, which a killed run leaves, is left out; a line that
    cannot be read anywhere else is a `UserError` that names it."""
    return [
        {key: _restored(value) for key, value in record.items()} if 'NaN"' in line or 'Infinity"' in line else record
        for line, record in _read(path)
    ]


def _read(path: Path) -> list[tuple[str, Record]]:
    """Lines as they stand in the file, and as records."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the metrics ({error.strerror}); expected the file that a run writes"
        ) from error
    pairs = []
    for number, line in enumerate(lines, 1):
        last = number == len(lines)  # What follows the last newline: nothing, or the beginning of a line.
        try:
            record = json.loads(line)
            if not {"kind", "step"} <= record.keys():
                raise ValueError("not a record")
        except (ValueError, AttributeError) as error:
            if last:
                break
            raise UserError(
                f"{path}, line {number}: found {line[:60]!r}, expected a JSON object with kind and step; "
                "restore the file from a copy, or remove that line"
            ) from error
        pairs.append((line, record))
    return pairs


def replace_file(path: Path, text: str) -> None:
    """Writes a text file so that a reader, or a machine that loses power, sees the old content or the new one whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _truncate(path: Path, resume_step: int) -> None:
    old = _read(path) if resume_step and path.exists() else []
    replace_file(path, "".join(f"{line}\n" for line, record in old if record["step"] <= resume_step))


def _line(record: Record) -> bytes:
    try:
        text = json.dumps(record, allow_nan=False)
    except ValueError:  # Rare, and looking for it in every nested value is slow.
        text = json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False)
    return text.encode() + b"\n"


def _plain(value: Any) -> Any:
    """Python numbers, strings and nested lists; waits for a jax array to be computed."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or type(value) in (str, bool, int, float):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":  # bfloat16 and its like are not numpy's own.
        array = array.astype(np.float64)
    return array.tolist()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the metrics ({error.strerror or error}); expected a writable directory with free "
            "space. Free some space or choose another --workdir; the same command then resumes the run"
        ) from error
