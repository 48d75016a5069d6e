"""`dpo-video export-pairs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo_video.cli.options import console, resolve


def export_pairs(
    pairs: Annotated[
        str, typer.Argument(help="A folder that `dpo-video build` wrote, or its URL.")
    ],
    folder: Annotated[Path, typer.Argument(help="Where the files go.")],
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", help="Labels instead of the pairs' own; repeat for a vote."),
    ] = None,
) -> None:
    """Write pairs as the pair_00000.pt files that Video-DPO publishes, prompts beside them.

    The format knows winners and losers only: ties are left out, labels that differ between frames
    become their majority, and regions are lost. What was lost is said.
    """
    from dpo_video.data.store import PairStore
    from dpo_video.data.videodpo import export_triples
    from dpo_video.workflows.session import apply_labels

    config = resolve(None, None, train_labels=labels or None)
    done = export_triples(apply_labels(config, PairStore(pairs)).store, folder)
    console.print(f"{done.written} pairs in [bold]{folder}[/]")
    for count, what in (
        (done.undecided, "left out: neither video is preferred"),
        (done.simplified, "written by the majority of their labels, which differ between frames"),
        (done.regions, "written without their region"),
    ):
        if count:
            console.print(f"[yellow]{count}[/] {what}")
