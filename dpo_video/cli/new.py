"""`dpo-video new`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo_video.cli.console import BOLD, say
from dpo_video.errors import UserError
from dpo_video.text import quoted


def new(
    kind: Annotated[
        str, typer.Argument(help="A kind of strategy, such as loss (see `dpo-video list`).")
    ],
    name: Annotated[str, typer.Argument(help="Name of the strategy, such as my-loss.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; by default dpo-video-NAME.")
    ] = None,
) -> None:
    """Write a plugin package with a strategy that works, its test and its entry point."""
    from dpo_video.cli import COMMANDS
    from dpo_video.workflows.new import new_plugin

    if kind == "command" and name in COMMANDS:
        raise UserError(f"There is a command '{name}' already. Choose another name.")

    folder = new_plugin(kind, name, out)
    say("Written: ", (str(folder), BOLD))
    say(
        f"Install it, then run its test: pip install -e {quoted(folder)} && pytest {quoted(folder)}"
    )
