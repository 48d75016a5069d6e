"""Commands of plugins: functions that Typer reads, named in the group `dpo_video.command`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from dpo_video import registry
from dpo_video.errors import PluginError
from dpo_video.registry.packaged import called
from dpo_video.text import help_of

KIND = "command"
"""Of the entry points' group, `dpo_video.command`."""


def command_of(function: Callable[..., Any] | typer.Typer, name: str) -> Any:
    """The click command of a function with Typer's annotations, or of a Typer application.

    An attribute `context_settings` of the function is passed to Typer.
    """
    if isinstance(function, typer.Typer):
        made = typer.main.get_command(function)
    else:
        app = typer.Typer(add_completion=False)
        settings = getattr(function, "context_settings", None)
        app.command(name, help=help_of(function), context_settings=settings)(function)
        made = typer.main.get_command(app)
    made.name = name
    return made


def load_command(name: str) -> Any:
    """The command of an entry point.

    Raises:
        UserError: for an unknown name.
        PluginError: if several packages have the name, or it cannot be imported, or is no function.
    """
    entry = registry.find(KIND, name)
    loaded = registry.imported(entry)
    try:
        return command_of(loaded, name)
    except Exception as error:  # annotations that Typer cannot read
        raise PluginError(
            f"{called(entry)} is no function that Typer can read ({type(error).__name__}: {error})."
        ) from error
