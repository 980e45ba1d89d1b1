"""What starts `--processes` and waits for them: signals, orphans, and who is left when one has failed. Without jax."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = """
import ctypes, os, subprocess, sys, time
from launch.processes import start_local
{before}
sys.exit(start_local(2, [sys.executable, "-c", {child!r}, *{arguments!r}]))
"""
CHILD = """
import os, subprocess, sys, time
index = os.environ["DROVER_PROCESS_ID"]
"""
STOPS = (
    CHILD
    + """
from trainer.signals import StopRequest
stop = StopRequest()
with stop.listening():
    stop.nothing_to_save = False
    os.write(1, b"ready\\n")
    stop.requested.wait(60)
    time.sleep(1)
    os.write(1, b"saved\\n")
sys.exit(stop.exit_code)
"""
)


def launched(child: str, *arguments: str, before: str = "", passed: Sequence[int] = ()) -> subprocess.Popen[str]:
    """Two processes of this program and what starts them, in a process group of their own."""
    code = LAUNCHER.format(before=before, child=child, arguments=list(arguments))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        start_new_session=True,
        pass_fds=passed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def assert_stopped(process: subprocess.Popen[str], number: signal.Signals) -> None:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert output.count("saved\n") == 2 and "left at once" not in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to what started them", "to all of the group"])
def test_a_signal_reaches_all_and_counts_once(send, number: signal.Signals) -> None:
    process = launched(STOPS)
    assert process.stdout
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    send(process.pid, number)
    time.sleep(0.3)
    send(process.pid, number)  # as of a service that tells each process and whoever started it
    assert_stopped(process, number)


def test_a_second_signal_that_is_not_the_first_again_leaves_at_once() -> None:
    code = "import trainer.signals\ntrainer.signals.ONE_SECONDS = 0.2\n" + STOPS
    for second, wait in ((signal.SIGTERM, 0.5), (signal.SIGINT, 0.1)):
        process = launched(code)
        assert process.stdout
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        process.terminate()
        time.sleep(wait)
        process.send_signal(second)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + second
        assert output.count(f"{second.name}: left at once.") == 2 and "saved" not in output


def test_ctrl_c_of_a_terminal_is_not_passed_on_to_those_who_got_it() -> None:
    # In a child that does not yet listen, a second one would interrupt the message of the first.
    master, slave = os.openpty()
    child = CHILD + (
        "import signal\n"
        "heard = []\n"
        "signal.signal(signal.SIGINT, lambda *_: heard.append(1))\n"
        "os.write(1, b'ready\\n')\n"
        "deadline = time.monotonic() + 2\n"
        "while time.monotonic() < deadline: time.sleep(0.1)\n"
        "os.write(1, b'heard %d\\n' % len(heard))\n"
    )
    terminal = f"import fcntl, termios; fcntl.ioctl({slave}, termios.TIOCSCTTY, 0)"
    process = launched(child, before=terminal, passed=[slave])
    assert process.stdout
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    os.write(master, b"\x03")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "heard 1\n" * 2)
    os.close(master)
    os.close(slave)


def test_orphans_that_it_is_given_are_nothing_to_it() -> None:
    """As the first process of a container is, by the kernel."""
    adopts = "assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0"  # PR_SET_CHILD_SUBREAPER
    child = CHILD + (
        "subprocess.run(['sh', '-c', 'sleep 0.3 &'], check=True)\n"  # sleep loses its parent
        "time.sleep(1)\n"
        "sys.exit(int(index) * 5)\n"
    )
    process = launched(child, before=adopts)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (5, "")


@pytest.mark.parametrize("deaf", [False, True])
def test_when_one_fails_before_it_has_met_the_others_they_are_ended(deaf: bool) -> None:
    before = "import launch.processes; launch.processes._GRACE_SECONDS = 1"
    ignores = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if deaf else ""
    child = CHILD + ignores + "if index == '1': sys.exit(2)\ntime.sleep(600)\n"
    process = launched(child, "--peer-timeout=2", before=before)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "process 1 has ended with status 2, and 2 s later processes 0 still run: they are told to end." in output
