"""`dpo-video build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_video.cli.console import BOLD, say
from dpo_video.cli.options import BUILDING, RUN, takes


@takes(BUILDING)
def build(
    options: dict[str, Any],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of the pairs; by default one under runs/pairs.",
            rich_help_panel=RUN,
        ),
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(
            "--worker",
            metavar="K/N",
            help="Build one of N parts: 1/8 to 8/8 share a folder.",
            rich_help_panel=RUN,
        ),
    ] = None,
) -> None:
    """Build preference pairs, or the missing ones of an interrupted build.

    Several workers may share a folder, on one machine or on a shared disk: start them with
    --worker 1/8 to 8/8, or all at once with `accelerate launch`. The pairs are the same.
    """
    from dpo_video.cli.display import TerminalProgress
    from dpo_video.workflows.build import build_pairs

    with TerminalProgress() as progress:
        store = build_pairs(**options, out=out, worker=worker, progress=progress)
    say(
        f"{len(store)} pairs in ",
        (str(store.folder), BOLD),
        f". Train on them: dpo-video train --pairs {store.folder}/",
    )
