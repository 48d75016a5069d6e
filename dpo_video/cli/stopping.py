"""SIGTERM, which preemptible machines send before they stop.

A command without a state to save ends at once. One that has to save first takes
`stop_event()`, saves, and ends with `exit_resumable`. The exit status is 143 (128 + 15), as for a
process that does not handle the signal.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from dpo_video.cli.console import BOLD, say, typed

EXIT_CODE = 128 + signal.SIGTERM


class TerminatedError(BaseException):
    """SIGTERM was received; not an Exception, so that `except Exception` does not swallow it."""


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the code inside, running every `finally` on the way."""
    received = False

    def end(*_: object) -> None:
        nonlocal received
        received = True
        raise TerminatedError

    with _handling(end):
        try:
            yield
        except (TerminatedError, Exception):
            if not received:
                raise
            # A library may turn it into an error of its own, as safetensors does.
            exit_resumable(typed(), "Stopped.")


@contextmanager
def stop_event() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, for code that stops by itself."""
    received = threading.Event()
    with _handling(lambda *_: received.set()):
        yield received


def exit_resumable(command: str, done: str) -> NoReturn:
    """Print the command that resumes the work, and exit."""
    say(f"{done} Resume with: ", (command, BOLD))
    sys.exit(EXIT_CODE)


@contextmanager
def _handling(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only it can handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
