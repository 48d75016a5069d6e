"""`dpo-video estimate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dpo_video.cli.console import DIM, show, show_json
from dpo_video.cli.options import Json, option, takes

DOES_NOT_FIT = 3  # exit code


@takes("recipe", "pairs", "backbone", "loss", "reference", "set", "config", "allow_code", "tier")
def estimate(
    options: dict[str, Any],
    efficiency: Annotated[
        float | None,
        option(
            "--efficiency",
            "Assumed share of a card's published speed; by default the backbone's.",
            min=0.01,
            max=1,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict memory and time of a run in every memory mode, before a weight is loaded.

    It needs no GPU and no weights: the training's own step runs on shapes, and so do building
    pairs, validation videos and an evaluation. --tier names the card and applies its presets. The
    exit code is 0 if all of it fits that card or none is named, 3 if something does not fit, and 2
    if the command itself was wrong.
    """
    from dpo_video.cli.display import TerminalProgress
    from dpo_video.workflows.estimate import estimate

    with TerminalProgress() as progress:
        found = estimate(efficiency=efficiency, progress=progress, **options)
    if as_json:
        show_json(found.to_dict())
    else:
        show(found.headline, "", found.table(), "", found.phase_table())
        show(("\n" + found.legend, DIM), "\n" + found.verdict)
    if found.fits is False or not found.within_budget:
        raise typer.Exit(DOES_NOT_FIT)
