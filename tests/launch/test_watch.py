"""Processes that only watch each other: one whose main thread is stuck is alive, and still found."""

import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import watch

ROOT = Path(__file__).parents[2]
COUNT = 3
CODE = """
import os, socket, sys, threading, time
from launch import watch

watch.BEAT_SECONDS, watch.PATIENCE = 0.05, 0.2
index, port, listener = map(int, sys.argv[1:4])
listener = socket.socket(fileno=listener) if index == 0 else None
me = watch.connect(index, 3, bytes(16), ("127.0.0.1", port), listener, timeout=10, quiet=index > 0)
{then}
me.leave()
"""
WAITING = "threading.Event().wait()"


def group(*programs: str) -> list[subprocess.Popen[str]]:
    """Processes 0 to 2, each of which runs its program once all are connected. Two seconds are the limit to be behind."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = str(listener.getsockname()[1]), str(listener.fileno())
        return [
            subprocess.Popen(
                [sys.executable, "-c", CODE.format(then=then), str(index), *place],
                cwd=ROOT,
                pass_fds=[listener.fileno()] if index == 0 else [],
                stderr=subprocess.PIPE,
                text=True,
            )
            for index, then in enumerate(programs)
        ]


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Exit statuses, and what each wrote to stderr."""
    texts = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], texts


@pytest.fixture(scope="module")
def groups() -> dict[object, list[subprocess.Popen[str]]]:
    """They mostly wait, and do so at the same time."""
    further = f"me.reached(1); me.reached(2); {WAITING}"
    stuck = "me.reached(1); lock = threading.Lock(); lock.acquire(); lock.acquire()"
    compiling = "time.sleep(3)"
    slow = "for step in range(8): me.reached(step); time.sleep(0.5)"
    same = "me.reached(9); me.reached(9); time.sleep(3)"
    within = f"me.reached(1); me.reached(1); {WAITING}"
    return {
        0: group(stuck, further, further),
        1: group(further, stuck, further),
        "within a step": group(within, f"me.reached(1); {WAITING}", within),
        "killed": group(WAITING, "os.kill(os.getpid(), 9)", WAITING),
        "fails": group(WAITING, "me.fail('broken. Mend it.'); os._exit(2)", WAITING),
        "compiling": group("me.reached(9); time.sleep(4)", compiling, compiling),
        "slow": group("me.reached(9); time.sleep(6)", slow, slow),
        "all wait": group(same, same, same),
    }


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_alive_but_stuck_is_named_and_all_end(groups, victim: int) -> None:
    pid = groups[victim][victim].pid
    statuses, (first, *others) = ended(groups[victim])
    assert statuses == [3] * COUNT, first
    assert f"process {victim} (pid {pid} on {socket.gethostname()}) is alive, but has not gone on from step 1" in first
    assert "others wait for it at step 2" in first
    assert others == [""] * (COUNT - 1)  # one speaks on a terminal that they share


def test_one_that_is_stuck_within_a_step_is_found_as_well(groups) -> None:
    statuses, (first, *others) = ended(groups["within a step"])
    assert statuses == [3] * COUNT, first
    assert "has not gone on from step 1 for" in first and "others wait for it at step 1, part 1" in first
    assert others == [""] * (COUNT - 1)


@pytest.mark.parametrize(("name", "status", "words"), [
    ("killed", -9, "ended without a word (killed, or out of memory)"),
    ("fails", 2, "process 1: broken. Mend it."),
])  # fmt: skip
def test_one_that_dies_or_fails_ends_the_others_at_once(groups, name: str, status: int, words: str) -> None:
    statuses, (first, *others) = ended(groups[name])
    assert statuses == [3, status, 3]
    assert words in first and others == [""] * (COUNT - 1)


def test_a_last_beat_after_the_word_that_a_process_has_left_is_nothing() -> None:
    here, there = socket.socketpair()
    also_here, also_there = socket.socketpair()
    me = watch.Watch(0, {here: 1, also_here: 2}, timeout=60)
    there.sendall(b'{"left": true}\n{"place": [3, 0]}\n')
    also_there.sendall(b'{"place": [2, 1]}\n')
    for _ in range(100):
        if me._places == {2: (2, 1)} and here not in me._peers:
            break
        time.sleep(0.1)
    assert me._places == {2: (2, 1)} and me._thread.is_alive()
    me.leave()


def test_callers_of_another_kind_are_sent_away_and_processes_that_do_not_call_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "GREETING_SECONDS", 0.2)
    token, found = bytes(range(16)), []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        waiting = threading.Thread(
            target=lambda: found.append(watch.connect(0, 2, token, address, listener, timeout=30, quiet=True))
        )
        waiting.start()
        silent, other, rude = (socket.create_connection(address) for _ in range(3))
        other.sendall(bytes(20))
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        rude.close()  # with a reset
        watch.connect(1, 2, token, address, None, timeout=30, quiet=True).leave()
        waiting.join(timeout=60)
    assert other.recv(1) == silent.recv(1) == b""
    (me,) = found
    me.leave()
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(TimeoutError, match=r"not called in 0\.2 s by process 1, 2"),
    ):
        watch.connect(0, 3, token, listener.getsockname(), listener, timeout=0.2, quiet=True)


@pytest.mark.parametrize("name", ["compiling", "slow", "all wait"])
def test_one_that_compiles_or_goes_on_slowly_is_waited_for(groups, name: str) -> None:
    statuses, texts = ended(groups[name])
    assert (statuses, texts) == ([0] * COUNT, [""] * COUNT)
