"""How a signal ends a command: with the command that resumes its work, and status 128 + signal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from dpo_video.cli.console import BOLD, say, typed
from dpo_video.support.interrupts import StopSignal, raised

FROM_ANOTHER = 143
"""Exit status of a process that stops because another process of its run was sent a signal."""


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end the code inside, running every `finally` on the way."""
    with raised() as received:
        try:
            yield
        except StopSignal as stop:
            exit_resumable(stop.command or typed(), stop.done, stop.code)
        except Exception:
            # A library may turn the signal into an error of its own, as safetensors does.
            if (number := received()) is None:
                raise
            exit_resumable(typed(), "Stopped.", StopSignal(number).code)


def exit_resumable(command: str, done: str, code: int) -> NoReturn:
    """Print the command that resumes the work, and exit."""
    launcher = "" if os.environ.get("WORLD_SIZE", "1") == "1" else ", under the same launcher"
    with suppress(OSError):  # a terminal that is gone
        say(f"{done} Resume with{launcher}: ", (command, BOLD))
    sys.exit(code)
