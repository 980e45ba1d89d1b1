"""Ctrl-C and SIGTERM: the first asks the loop to save and leave, the second leaves at once."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

ONE_SECONDS = 2.0
"""The same signal again within this time is the first one: of `kill -PGID` and of systemd, a process of `--processes` hears
itself and again from the one that started it."""

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a process that another one's signal has stopped."""


class StopRequest:
    """What the loop looks at between steps.

    Python runs signal handlers between bytecodes of the main thread, which may be minutes inside the compiler. So a
    thread reads the signals off a pipe as they arrive: a second one ends the process at once, and so does the first as
    long as there is nothing to save.
    """

    def __init__(self, quiet: bool = False) -> None:
        """`quiet`: say nothing, another process does."""
        self._quiet = quiet
        self.requested = threading.Event()
        self.nothing_to_save = True
        self.signal_name = ""
        self.exit_code = 0

    def _watch(self, pipe: int) -> None:
        first, since = 0, 0.0
        while data := os.read(pipe, 1):  # until the pipe is closed, as the loop has ended
            if data[0] == first and time.monotonic() - since < ONE_SECONDS:
                continue
            self.signal_name, self.exit_code = signal.Signals(data[0]).name, 128 + data[0]
            if first or self.nothing_to_save:
                self._say(f"\n{self.signal_name}: left at once.")
                os._exit(self.exit_code)
            first, since = data[0], time.monotonic()
            self._say(f"\n{self.signal_name}: saving, then leaving. Once more to leave at once.")
            self.requested.set()

    def _say(self, text: str) -> None:
        if not self._quiet:
            with contextlib.suppress(OSError):  # nobody reads it any more
                print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Installs the handlers, and puts the old ones back at the end."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        old_wakeup = signal.set_wakeup_fd(writer)
        handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        thread = threading.Thread(target=self._watch, args=(reader,), daemon=True, name="signals")
        thread.start()
        try:
            yield self
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_wakeup)
            os.close(writer)
            thread.join()
            os.close(reader)
