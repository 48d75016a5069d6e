"""Exceptions for faults that the user can fix. Each message names the fault and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

_LONGEST = 2000  # characters of a message


class UserError(Exception):
    """A fault that the user can fix: shown as one line without a traceback, exit code 2.

    The message is reduced to one printable line, whatever it quotes from a file.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text as one printable line, with escapes for control characters, cut in the middle."""
    half = _LONGEST // 2
    if len(text) > _LONGEST:  # first, because a quoted file may be large
        text = f"{text[:half]} ... {text[-half:]}"
    words = " ".join(text.split()) if any(c in text for c in "\n\r\t\v\f") else text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def first_fault(error: ValidationError) -> str:
    """Location and reason of the first validation error."""
    detail = error.errors()[0]
    location = ".".join(str(part) for part in detail["loc"])
    reason = detail["msg"].removeprefix("Value error, ")
    return f"{location}: {reason}" if location else reason


class PluginError(UserError):
    """A plugin that cannot be loaded; the message names its distribution."""


class StoreError(UserError):
    """A pair store that is missing, damaged, or made for something else."""


class RunError(UserError):
    """A run directory that is missing, damaged, or does not match the request."""


class TrainingError(UserError):
    """Training stopped, or cannot start."""


class BudgetError(UserError):
    """No number of checkpointed blocks fits the memory budget."""


class ExportError(UserError):
    """An export that does not load back as what was exported; its files have been removed."""


def unknown(what: str, name: str, available: Iterable[str]) -> UserError:
    """The UserError for an unknown name, with the closest available one."""
    options = sorted(available)
    near = difflib.get_close_matches(name, options, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"Unknown {what} '{name}'.{hint} Available: {', '.join(options) or 'none'}.")
