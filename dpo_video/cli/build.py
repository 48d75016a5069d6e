"""`dpo-video build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from dpo_video.cli.console import BOLD, say
from dpo_video.cli.options import BUILDING, option, takes
from dpo_video.support.formatting import counted


@takes(*BUILDING)
def build(
    options: dict[str, Any],
    out: Annotated[
        Path | None, option("--out", "Folder of the pairs; by default one under runs/pairs.")
    ] = None,
    worker: Annotated[
        str | None,
        option("--worker", "Build one of N parts: 1/8 to 8/8 share a folder.", metavar="K/N"),
    ] = None,
) -> None:
    """Build preference pairs, or the missing ones of an interrupted build.

    Several workers may share a folder, on one machine or on a shared disk: start them with
    --worker 1/8 to 8/8, or all at once with `accelerate launch`. The pairs are the same.
    """
    from dpo_video.cli.display import TerminalProgress
    from dpo_video.workflows.build import build_pairs
    from dpo_video.workflows.pairs import next_step

    with TerminalProgress() as progress:
        store = build_pairs(**options, out=out, worker=worker, progress=progress)
    say(f"{counted(len(store), 'pair')} in ", (str(store.folder), BOLD), f". {next_step(store)}")
