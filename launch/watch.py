"""Processes of one run watch each other: when one dies, fails or hangs, the others say which, and end.

Otherwise they would wait for it in a collective for ever. Each process has a connection to process 0, which relays what
it learns; a beat a second says that the other side is alive. A thread does this, so it works while jax waits or compiles.
A beat also says how far the process has come, by which process 0 finds one that is alive and stuck.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import Any

PEER_LOST = 3
"""Exit status of a process that ended because another one did."""
BEAT_SECONDS = 1.0
PATIENCE = 5
"""A process may be a step behind the others for so many timeouts, as long as it takes to copy a checkpoint's arrays."""
GREETING_SECONDS = 5.0
"""Processes say who they are at once; another caller, a port scanner say, does not keep the others waiting."""
_NOTE_BYTES = 4000

Place = tuple[int, int]
"""How far a process has come: its step, and how often it has gone on within that."""


class Watch:
    """The connections of one process, and the thread that listens to them."""

    def __init__(self, index: int, peers: dict[socket.socket, int], timeout: float, quiet: bool = False):
        """`peers`: connection -> number of the process at its other end. `timeout`: seconds without a beat.

        `quiet`: this process need not say what process 0 says on the same terminal.
        """
        self._index, self._timeout, self.quiet = index, timeout, quiet
        self._peers, self._unread = peers, dict.fromkeys(peers, b"")
        self._heard = dict.fromkeys(peers, time.monotonic())
        name = f"process {index} (pid {os.getpid()} on {socket.gethostname()})"
        self._names = {number: f"process {number}" for number in peers.values()} | {index: name}
        self._place: Place | None = None
        self._places: dict[int, Place] = {}
        self._behind: dict[int, tuple[Place, float]] = {}
        self._lock, self._done = threading.Lock(), threading.Event()
        self._selector = selectors.DefaultSelector()
        for connection in peers:
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)
        self._send({"name": name})
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    def reached(self, step: int) -> None:
        """This process has a step's batch and begins with it, or has come further within that step, as all do.

        Before its first step it may compile as long as it likes.
        """
        before = self._place or (step, -1)
        self._place = (step, before[1] + 1 if step == before[0] else 0)

    def leave(self) -> None:
        """This process has done its part and may end."""
        self._done.set()
        self._send({"left": True})
        self._thread.join(timeout=5)

    def fail(self, text: str) -> None:
        """This process is about to end because of an error; the others shall too, and say so."""
        self._done.set()
        self._send({"failed": f"process {self._index}: {text.strip()[:_NOTE_BYTES]}"})
        self._thread.join(timeout=5)

    def _send(self, note: dict[str, Any], beside: socket.socket | None = None) -> None:
        line = json.dumps(note).encode() + b"\n"
        with self._lock:
            for connection in list(self._peers):
                if connection is not beside:
                    with contextlib.suppress(OSError):  # full or closed: listening finds out why
                        connection.sendall(line)

    def _run(self) -> None:
        beat = time.monotonic()
        while not self._done.is_set():
            for key, _ in self._selector.select(BEAT_SECONDS / 4):
                self._read(key.fileobj)
            now = time.monotonic()
            if now - beat >= BEAT_SECONDS:
                if now - beat > self._timeout / 2:  # this process stood still itself, and cannot tell who else did
                    self._heard = dict.fromkeys(self._heard, now)
                    self._behind.clear()
                beat = now
                self._send({} if self._place is None else {"place": self._place})
                if self._index == 0:
                    self._check_places(now)
            for connection, heard in list(self._heard.items()):
                if now - heard > self._timeout:
                    self._lost(connection, f"has not been heard of for {self._timeout:g} s (it hangs, or is cut off)")

    def _check_places(self, now: float) -> None:
        """Ends the run where a process stays at its place and others are further: they wait for it."""
        if self._place is not None:
            self._places[0] = self._place
        furthest = max(self._places.values(), default=(0, 0))
        # A process is behind since it came to its place, or since another one went further.
        self._behind = {
            number: (place, since if place == before else now)
            for number, place in self._places.items()
            if place < furthest
            for before, since in [self._behind.get(number, (place, now))]
        }
        for number, (place, since) in self._behind.items():
            if now - since > PATIENCE * self._timeout:
                self._end(
                    f"{self._names[number]} is alive, but has not gone on from {_said(place)} for {now - since:.0f} s, and "
                    f"others wait for it at {_said(furthest)} (it hangs: in its data, in a file system, in a lock?)."
                )

    def _read(self, connection: Any) -> None:
        try:
            data = connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost(connection, "ended without a word (killed, or out of memory)")
            return
        self._heard[connection] = time.monotonic()
        *lines, self._unread[connection] = (self._unread[connection] + data).split(b"\n")
        for line in lines:
            if connection in self._peers:  # a last beat may follow the word that it has left
                self._take(connection, json.loads(line))

    def _take(self, connection: socket.socket, note: dict[str, Any]) -> None:
        if "name" in note:
            self._names[self._peers[connection]] = str(note["name"])
        if "place" in note:
            step, part = note["place"]
            self._places[self._peers[connection]] = (int(step), int(part))
        if "left" in note:
            self._forget(connection)
        if "failed" in note:
            self._end(str(note["failed"]), beside=connection, told=self.quiet)

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._heard.pop(connection)
        with self._lock:
            self._places.pop(self._peers.pop(connection), None)

    def _lost(self, connection: socket.socket, how: str) -> None:
        self._end(f"{self._names[self._peers[connection]]} {how}.", beside=connection)

    def _end(self, text: str, beside: socket.socket | None = None, told: bool = False) -> None:
        """Tells the others, then ends this process: what it is doing cannot be finished."""
        if self._done.is_set():  # this process ends by itself
            return
        self._send({"failed": text}, beside)
        if not told:
            with contextlib.suppress(OSError):  # nobody reads it any more
                print(
                    f"\n{text}\nThe other processes cannot go on without it and end too. The same command goes on from the "
                    "newest checkpoint.",
                    file=sys.stderr,
                    flush=True,
                )
        os._exit(PEER_LOST)


def _said(place: Place) -> str:
    step, part = place
    return f"step {step}, part {part} (held-out data, a save, a cache)" if part else f"step {step}"


def connect(
    index: int, count: int, token: bytes, address: tuple[str, int], listener: Any, timeout: float, quiet: bool
) -> Watch:
    """The watch of process `index` of `count`; process 0 listens at `address` (host, port), the others call it.

    Args:
        token: what only processes of this run know; callers without it, or silent ones, are sent away.
        listener: the listening socket in process 0, None in the others.
        timeout: seconds to wait for the others here, and without a beat from then on.
        quiet: see `Watch`.

    Raises:
        TimeoutError: not all came in time.
    """
    if index:
        connection = socket.create_connection(address, timeout=timeout)
        connection.sendall(token + index.to_bytes(4, "big"))
        return Watch(index, {connection: 0}, timeout, quiet)
    peers: dict[socket.socket, int] = {}
    until = time.monotonic() + timeout
    while len(peers) < count - 1:
        listener.settimeout(max(until - time.monotonic(), 1e-3))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            silent = sorted(set(range(1, count)) - set(peers.values()))
            raise TimeoutError(f"not called in {timeout:g} s by process {', '.join(map(str, silent))}") from None
        number = _caller(connection, token)
        if 0 < number < count:
            peers[connection] = number
        else:
            connection.close()
    listener.close()
    return Watch(0, peers, timeout)


def _caller(connection: socket.socket, token: bytes) -> int:
    """The number of the process that calls; 0 for one that is not of this run."""
    connection.settimeout(GREETING_SECONDS)
    greeting = b""
    try:
        while len(greeting) < len(token) + 4 and (part := connection.recv(len(token) + 4 - len(greeting))):
            greeting += part
    except OSError:  # it says nothing, or went away
        return 0
    return int.from_bytes(greeting[len(token) :], "big") if greeting[: len(token)] == token else 0
