"""`dpo-video evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_video.cli.console import BOLD, DIM, say, show, typed
from dpo_video.cli.options import Json, option, takes


@takes(
    "prompts", "num_prompts", "num_videos_per_prompt", "batch_size", "metrics", "min_effect",
    "tolerance", "min_prompts", "set", "device", "deterministic", "checkpoint",
)  # fmt: skip
def evaluate(
    options: dict[str, Any],
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[
        Path | None,
        option("--out", "Folder to write; by default RUN/evaluation, or RUN/evaluation-STEP."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a run's tuned model with its base on identical prompts and seeds.

    Writes evaluation.json, the videos of both models and a self-contained page, index.html.
    """
    from dpo_video.cli.display import TerminalProgress
    from dpo_video.workflows.evaluate import evaluate, evaluation_folder
    from dpo_video.workflows.runs import Run

    with TerminalProgress() as progress:
        evaluation = evaluate(run, **options, out=out, command=typed(), progress=progress)
    if as_json:
        typer.echo(evaluation.to_json())
        return
    show(evaluation.table())
    for detail in evaluation.verdict.details:
        say(("- ", DIM), detail)
    page = evaluation_folder(Run.open(run), options["checkpoint"], out) / "index.html"
    say("\nOpen the page: ", (str(page), BOLD))
