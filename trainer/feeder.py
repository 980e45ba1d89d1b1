"""Batches on their way to the device, one step ahead."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from data.pipeline import WHERE, Batch, Batches

AHEAD = 2
"""Batches kept on the device beside the one in use."""


class Fed(NamedTuple):
    """A batch where it is used."""

    batch: Any
    """What the feeder's `put` made of it."""
    where: np.ndarray
    """In the data it begins."""
    data_wait: float
    """Seconds for which the device had nothing to do but wait for data."""
    teacher_wait: float | None = None
    """Seconds for which it waited for a teacher on devices of its own."""


class Feeder:
    """Moves batches to the device on a thread, and measures how long the device waits for them."""

    def __init__(self, batches: Batches, put: Callable[[Batch], Any]):
        """`put` moves a batch to where it is used."""
        self._queue: queue.Queue[Any] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(batches, put), daemon=True, name="feeder")
        self._thread.start()

    def _run(self, batches: Batches, put: Callable[[Batch], Any]) -> None:
        try:
            for batch in batches:
                where = batch.pop(WHERE)
                if not self._put((put(batch), where)):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def next(self, device_idle: Callable[[], Any]) -> Fed:
        """The next batch.

        `device_idle` returns when the device has finished what it was given: a batch that is late for the queue but in
        time for the device costs nothing.
        """
        waited = 0.0
        try:
            item = self._queue.get_nowait()
        except queue.Empty:
            device_idle()
            start = time.perf_counter()
            item = self._queue.get()
            waited = time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        batch, where = item
        return Fed(batch, where, waited)

    def close(self) -> None:
        """Ends the thread; one that waits for a stalled worker is left behind, and ends with the process."""
        self._closed.set()
        self._thread.join(timeout=5)
