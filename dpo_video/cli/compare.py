"""`dpo-video compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_video.cli.console import BOLD, say, show
from dpo_video.cli.options import Json, option, takes


@takes(
    "recipe", "steps", "prompts", "num_prompts", "num_videos_per_prompt", "min_effect",
    "tolerance", "min_prompts", "device", "rebuild", "accept_pairs",
)  # fmt: skip
def compare(
    options: dict[str, Any],
    entries: Annotated[
        list[Path] | None,
        typer.Argument(
            help="TOML files of entries, or a run.toml; by default the package's own. Or folders "
            "of finished runs."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, option("--only", "Name of an entry to run; repeat for more.")
    ] = None,
    training_seeds: Annotated[
        list[int] | None,
        option("--training-seed", "Seed of pairs and training, for all entries; repeat for more."),
    ] = None,
    selection_prompts: Annotated[
        int | None,
        option(
            "--selection-prompts",
            "Number of prompts that choose the best entry; the others are reported.",
            min=2,
        ),
    ] = None,
    selection_seeds: Annotated[
        list[int] | None,
        option(
            "--selection-seed", "Training seed that chooses and is not reported; repeat for more."
        ),
    ] = None,
    out: Annotated[
        Path | None, option("--out", "Folder of all runs; by default runs/compare.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build, train and evaluate several entries of a file with the same seeds and prompts.

    Folders of finished runs are compared by the evaluations that they have, and nothing is trained:
    dpo-video compare runs/a runs/b.

    An entry is a table of a TOML file: its name in brackets, pairs = "local", loss = "region",
    recipe = "localdpo", set = ["train.learning_rate=1e-4"], and for several trainings seeds =
    [0, 1, 2].

    The table `selection` with prompts = 16 sets 16 prompts apart that choose the best entry; the
    report is on the others.

    Every cell is a run of its own, OUT/ENTRY/seed-N. Finished cells are not run again.
    """
    from dpo_video.cli.display import TerminalProgress
    from dpo_video.workflows.compare import compare

    out = out or Path("runs/compare")
    with TerminalProgress() as progress:
        comparison = compare(
            entries,
            only=only,
            training_seeds=training_seeds,
            selection_prompts=selection_prompts,
            selection_seeds=selection_seeds,
            out=out,
            progress=progress,
            **options,
        )
    if as_json:
        typer.echo(comparison.model_dump_json(indent=1))
        return
    show(comparison.table())
    say(
        "Open the page: ",
        (str(out / "index.html"), BOLD),
        f"; each run has its own page under {out}",
    )
