"""SIGINT, SIGTERM and SIGHUP: Ctrl-C, a machine that is taken away, a closed terminal.

All three end a command in the same way. Code that must save first holds them back with `deferred`;
elsewhere they raise a `StopSignal`, which runs every `finally` on the way. A second Ctrl-C ends the
process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

NUMBERS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class StopSignal(BaseException):
    """A signal was received; not an Exception, so that `except Exception` does not swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.done = "Stopped."
        """What was saved, as a sentence."""
        self.command: str | None = None
        """The command that resumes; None for the same one again."""

    @property
    def code(self) -> int:
        """The exit status, as for a process that does not handle the signal."""
        return 128 + self.number


@contextmanager
def raised() -> Iterator[Callable[[], int | None]]:
    """The signals raise a StopSignal in the body; yields a function that returns the first one."""

    def end(number: int) -> None:
        raise StopSignal(number)

    with _handled(end) as first:
        yield first


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """The signals are held back until the body has ended; yields whether one was received.

    After the body they are handled as before it: a command raises StopSignal, a notebook
    KeyboardInterrupt.
    """
    with _handled(lambda number: None) as first:
        yield lambda: first() is not None
    if (number := first()) is not None:
        signal.raise_signal(number)


@contextmanager
def _handled(act: Callable[[int], None]) -> Iterator[Callable[[], int | None]]:
    first: int | None = None

    def handle(number: int, _: Any) -> None:
        nonlocal first
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        if first is None:
            first = number
            act(number)
        elif number == signal.SIGINT and not _launched():
            _end_now(number)

    def lost(unraisable: Any) -> None:
        """Send a signal again whose exception Python dropped: in a callback of C, or `__del__`."""
        nonlocal first
        if not isinstance(stop := unraisable.exc_value, StopSignal):
            hook(unraisable)
            return
        first = None
        sender = threading.Timer(0.01, os.kill, (os.getpid(), stop.number))
        sender.daemon = True
        sender.start()

    before = {}
    hook = sys.unraisablehook
    # Only the main thread can handle signals; nohup and `command &` ignore some on purpose.
    if threading.current_thread() is threading.main_thread():
        before = {n: h for n in NUMBERS if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handle)
    sys.unraisablehook = lost
    try:
        yield lambda: first
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _launched() -> bool:
    """Whether a launcher started this process; it passes on the Ctrl-C that its workers have."""
    return "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"


def _end_now(number: int) -> NoReturn:
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # a progress bar has hidden the cursor
    os._exit(128 + number)


def _leave_terminal() -> None:
    """Write nowhere instead of to a terminal that is gone, which would fail."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
            if os.isatty(descriptor):
                os.write(descriptor, b"\n")
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
