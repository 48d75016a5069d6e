"""SIGTERM: what preemptible machines send before they take the power away.

A command that loses nothing by it stops where it is; one that has a state to save asks
`with later() as stopping`, saves, and ends itself by `go_on_with`. The exit code is 143 (128 + 15),
as if nobody had caught the signal.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from dpo_video.cli.options import console, typed

EXIT_CODE = 128 + signal.SIGTERM


class TerminatedError(BaseException):
    """SIGTERM came; no `except Exception` on the way out may swallow it."""


@contextmanager
def at_once() -> Iterator[None]:
    """Let SIGTERM end what is done inside: every `finally` on the way is passed."""
    asked = False

    def end(*_: object) -> None:
        nonlocal asked
        asked = True
        raise TerminatedError

    with _handling(end):
        try:
            yield
        except (TerminatedError, Exception):
            if not asked:
                raise
            # A library may have taken it for an error of its own, as safetensors does.
            go_on_with(typed(), "Stopped.")


@contextmanager
def later() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, for what stops by itself at a good moment."""
    asked = threading.Event()
    with _handling(lambda *_: asked.set()):
        yield asked


def go_on_with(command: str, done: str) -> NoReturn:
    """Say how to go on, and end."""
    console.print(f"{done} Go on by: [bold]{command}[/]", soft_wrap=True, highlight=False)
    sys.exit(EXIT_CODE)


@contextmanager
def _handling(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # a notebook's or a test's
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
