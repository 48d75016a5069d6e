"""`dpo-video check`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dpo_video.cli.console import show
from dpo_video.cli.options import Json, option, takes


@takes(
    "checks", "labels", "prompts", "backbone", "metrics", "set", "config", "allow_code", "device"
)
def check(
    options: dict[str, Any],
    pairs: Annotated[str, typer.Argument(help="Folder or URL of finished pairs.")],
    sample: Annotated[
        int,
        option(
            "--sample", "Number of pairs to decode, to compare the motion of both videos.", min=0
        ),
    ] = 32,
    as_json: Json = False,
) -> None:
    """Audit a pair set before training on it.

    The exit code is 0 if there is no problem (notices do not count), 1 if there is one, and 2 if
    the command itself was wrong.
    """
    from dpo_video.cli.display import TerminalProgress
    from dpo_video.workflows.pairs import check

    with TerminalProgress() as progress:
        found = check(pairs, sample=sample, progress=progress, **options)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        show(found.table(), f"\n{found.summary}")
    raise typer.Exit(1 if found.problems else 0)
