"""Errors that are raised on purpose. Each says what is wrong and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

_LONGEST = 2000  # characters; a file's whole content in its place tells nobody more


class UserError(Exception):
    """Something the user can put right: shown as one line, exit code 2, no traceback.

    Whatever a message quotes of a file, it stays one line that any terminal can show.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text without line breaks, terminal codes and what UTF-8 cannot say; cut in the middle."""
    half = _LONGEST // 2
    if len(text) > _LONGEST:  # first: what is quoted may be megabytes
        text = f"{text[:half]} ... {text[-half:]}"
    words = " ".join(text.split()) if any(c in text for c in "\n\r\t\v\f") else text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def first_fault(error: ValidationError) -> str:
    """What is wrong with what was read, and where in it."""
    detail = error.errors()[0]
    place = ".".join(str(part) for part in detail["loc"])
    reason = detail["msg"].removeprefix("Value error, ")
    return f"{place}: {reason}" if place else reason


class PluginError(UserError):
    """A plugin that cannot be loaded; the message names its distribution."""


class StoreError(UserError):
    """A pair store that is missing, damaged, or made for something else."""


class RunError(UserError):
    """A run directory that is missing, damaged, or does not fit what is asked of it."""


class TrainingError(UserError):
    """Training stopped itself, and says why."""


class BudgetError(UserError):
    """No number of checkpointed blocks fits the memory that there is."""


class ExportError(UserError):
    """An export that does not load back as what was exported; nothing of it is left."""


def unknown(what: str, name: str, available: Iterable[str]) -> UserError:
    """An error for a name that does not exist, with the nearest one that does."""
    options = sorted(available)
    near = difflib.get_close_matches(name, options, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"Unknown {what} '{name}'.{hint} Available: {', '.join(options) or 'none'}.")
