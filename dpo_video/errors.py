"""Exceptions for faults that the user can fix. Each message names the fault and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dpo_video.text import one_line, without_credentials

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """A fault that the user can fix: shown as one line without a traceback, exit code 2.

    The message is reduced to one printable line, whatever it quotes from a file, and URLs in it
    lose their credentials.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(without_credentials(message)))


_REASONS = {
    "int_type": "a whole number is needed",
    "int_parsing": "a whole number is needed",
    "int_from_float": "a whole number is needed",
    "float_type": "a number is needed",
    "float_parsing": "a number is needed",
    "finite_number": "a finite number is needed",
    "bool_type": "true or false is needed",
    "bool_parsing": "true or false is needed",
    "string_type": "a text is needed",
    "list_type": "a list is needed",
    "tuple_type": "a list is needed",
    "dict_type": "a table is needed",
    "model_type": "a table is needed",
    "missing": "it is missing",
    "extra_forbidden": "there is no such name",
    "greater_than": "it must be more than {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be less than {lt}",
    "less_than_equal": "it must be at most {le}",
    "literal_error": "it must be {expected}",
}
"""Type of a validation error to what is wrong, in plain words."""


def fault_reason(detail: Mapping[str, Any]) -> str:
    """What is wrong, of one entry of `ValidationError.errors()`."""
    known = _REASONS.get(detail["type"])
    if known is None:
        return str(detail["msg"]).removeprefix("Value error, ")
    return known.format(**detail.get("ctx", {}))


def first_fault(error: ValidationError) -> str:
    """Location and reason of the first validation error."""
    detail = error.errors()[0]
    location = ".".join(str(part) for part in detail["loc"])
    reason = fault_reason(detail)
    return f"{location}: {reason}" if location else reason


class PluginError(UserError):
    """A plugin that cannot be loaded; the message names its distribution."""


class StoreError(UserError):
    """A pair store that is missing, damaged, or made for something else."""


class RunError(UserError):
    """A run directory that is missing, damaged, or does not match the request."""


class BusyError(UserError):
    """A folder that another process is writing; the message names that process."""


class TrainingError(UserError):
    """Training stopped, or cannot start."""


class BudgetError(UserError):
    """No number of checkpointed blocks fits the memory budget."""


class ExportError(UserError):
    """An export that does not load back as what was exported; its files have been removed."""


_ELSEWHERE = {
    "lr": "learning_rate",
    "max_steps": "steps",
    "max_train_steps": "steps",
    "num_steps": "steps",
    "output_dir": "out",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "lora_rank": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lr_warmup_steps": "warmup_steps",
    "checkpointing_steps": "save_steps",
    "checkpoints_total_limit": "save_total_limit",
    "adam_weight_decay": "weight_decay",
}
"""Names of other libraries' options, such as those of TRL, Transformers and diffusers' scripts."""


def unknown(what: str, name: str, available: Iterable[str]) -> UserError:
    """The UserError for an unknown name, with the closest available one."""
    options = sorted(available)
    table, _, last = name.rpartition(".")
    meant = f"{table}." * bool(table) + _ELSEWHERE.get(last, "")
    near = [meant] if meant in options else difflib.get_close_matches(name, options, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"Unknown {what} '{name}'.{hint} Available: {', '.join(options) or 'none'}.")
