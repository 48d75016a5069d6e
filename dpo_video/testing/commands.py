"""Contract of commands."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import typer

from dpo_video.registry.commands import command_of
from dpo_video.testing.laws import contract, law
from dpo_video.text import help_of


@contract
def check_command(function: Callable[..., Any] | typer.Typer) -> None:
    """Check that Typer can read a function, and that it and its parameters have a help text."""
    name = getattr(function, "__name__", type(function).__name__)
    law(callable(function), f"{name} is no function.")
    command = command_of(function, "name")
    if not isinstance(function, typer.Typer):
        law(help_of(function), f"{name} has no docstring. It is the help of the command.")
    for parameter in command.params:
        law(
            getattr(parameter, "help", "") or parameter.name == "help",
            f"{name}'s parameter {parameter.name} has no help. Annotate it with typer.Option(help="
            "...) or typer.Argument(help=...).",
        )
    with redirect_stdout(StringIO()):  # help with a frame is printed
        command.get_help(command.context_class(command))
