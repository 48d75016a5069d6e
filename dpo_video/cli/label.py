"""`dpo-video label`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo_video.cli.console import BOLD, say, show, show_json
from dpo_video.cli.options import BACKBONE, CONFIG, DEVICE, LABELER, RUN, SET, Json, takes

if TYPE_CHECKING:
    from dpo_video.workflows.label import LabelSummary


@takes(LABELER, BACKBONE, SET, CONFIG, DEVICE)
def label(
    options: dict[str, Any],
    pairs: Annotated[str, typer.Argument(help="Folder of finished pairs.")],
    name: Annotated[
        str | None,
        typer.Option(
            "--as", help="Name of the labels; by default the labeler's.", rich_help_panel=RUN
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", min=0.01, help="Length of a segment in seconds.", rich_help_panel=RUN
        ),
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Label finished pairs, segment by segment, or the rest of them after an interruption.

    Labels are kept in PAIRS/labels, one set per name, and never overwritten. Train on them with
    dpo-video train --pairs PAIRS --labels NAME.
    """
    from dpo_video.cli.display import TerminalProgress
    from dpo_video.workflows.label import label

    with TerminalProgress() as progress:
        summary = label(pairs, name=name, seconds=seconds, progress=progress, **options)
    if as_json:
        show_json(summary.to_dict())
    else:
        _show(summary)


def _show(summary: LabelSummary) -> None:
    from dpo_video.cli.display import plain_table

    store, labels = summary.store, summary.labels
    labelled = len(labels.labels())
    columns = ("frames", "first better", "second better", "tie")
    table = plain_table(*columns, right=columns)
    for row in summary.segments:
        start, stop = row["frames"]
        shares = (f"{row[name]:.0%}" for name in ("first", "second", "tie"))
        table.add_row(f"{start}-{stop - 1}", *shares)
    show(f"{labelled} of {len(store)} pairs have labels: {labels.path}", table)
    for both, found in summary.agreement.items():
        kappa = "undefined" if found.kappa is None else f"{found.kappa:.2f}"
        share = "nothing in common" if found.share is None else f"{found.share:.0%} alike"
        show(f"Agreement of {both}: {share} of {found.segments} segments, Cohen's kappa {kappa}")
    for figure, value in summary.figures.items():
        show(f"{figure}: {value:.6g}")
    if labelled:
        command = f"dpo-video train --pairs {store.folder} --labels {labels.name}"
        say("Train on them: ", (command, BOLD))
