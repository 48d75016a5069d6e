"""`dpo-video label`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dpo_video.cli.console import say, show, show_json
from dpo_video.cli.options import Json, option, takes


@takes("labeler", "backbone", "set", "config", "allow_code", "device")
def label(
    options: dict[str, Any],
    pairs: Annotated[str, typer.Argument(help="Folder of finished pairs.")],
    name: Annotated[
        str | None, option("--as", "Name of the labels; by default the labeler's.")
    ] = None,
    seconds: Annotated[
        float, option("--seconds", "Length of a segment in seconds.", min=0.01)
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Label finished pairs, segment by segment, or the rest of them after an interruption.

    Labels are kept in PAIRS/labels, one set per name, and never overwritten. Train on them with
    dpo-video train --pairs PAIRS --labels NAME.
    """
    from dpo_video.cli.display import TerminalProgress
    from dpo_video.workflows.label import label
    from dpo_video.workflows.pairs import next_step, opened

    with TerminalProgress() as progress:
        summary = label(pairs, name=name, seconds=seconds, progress=progress, **options)
    if as_json:
        show_json(summary.to_dict())
        return
    show(summary.summary, summary.table(), *summary.details())
    if summary.labelled and not summary.all_ties:
        say(next_step(opened(pairs), "--labels", summary.name))
