"""Compare finished runs by the evaluations that they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_video.errors import UserError
from dpo_video.evaluation.results import Evaluation
from dpo_video.evaluation.rows import Cell
from dpo_video.workflows.config import Config, resolve
from dpo_video.workflows.runs import Run

_JUDGING = ("evaluate.min_effect", "evaluate.tolerance", "evaluate.min_prompts", "run.device")
"""Options that change nothing of what was measured."""


def check_finished(
    runs: Sequence[Path], arguments: Sequence[Path | str], options: Mapping[str, Any]
) -> None:
    """Refuse arguments that are no runs, and options that mean nothing for finished runs."""
    if len(runs) < len(arguments):
        raise UserError(
            f"'{runs[0]}' is a folder, and other arguments are files. Name folders of finished "
            "runs only, or files of entries only."
        )
    for name, value in options.items():
        if value and name not in _JUDGING:
            flag = "--" + name.rpartition(".")[2].replace("_", "-")
            raise UserError(
                f"Finished runs are compared as they are: leave {flag} out, or name a file of "
                "entries."
            )


def finished_cells(folders: Sequence[Path], flags: Mapping[str, Any]) -> tuple[list[Cell], Config]:
    """The cells of finished runs, and the first run's configuration.

    Runs in ENTRY/seed-N are the training seeds of one entry; every other run is an entry.

    Args:
        folders: Folders of runs that were evaluated on the same prompts and seeds.
        flags: Options of [evaluate] by their path that replace those of the runs.

    Raises:
        UserError: if a run has no evaluation, or one on other prompts.
    """
    cells: dict[tuple[str, int], Cell] = {}
    first: Evaluation | None = None
    configs: list[Config] = []
    for folder in folders:
        run = Run.open(folder)
        evaluation, repeat = run.evaluation(), run.evaluate_command
        if evaluation is None:
            raise UserError(f"'{folder}' has no evaluation. Evaluate it first: {repeat}")
        first = first or evaluation
        if _drawn(evaluation) != _drawn(first):
            raise UserError(
                f"'{folder}' was evaluated on other prompts, seeds or base videos than "
                f"'{folders[0]}'. Evaluate both alike, with the same --prompts or --num-prompts: "
                f"{repeat}"
            )
        configs.append(resolve(file=run.folder / "run.toml", flags=flags))
        entry, seed = _name(run), configs[-1].run.seed
        if (entry, seed) in cells:
            raise UserError(
                f"Two runs are named '{entry}' and have the seed {seed}. Rename the folder of one."
            )
        cells[entry, seed] = Cell.of(entry, seed, evaluation, configs[-1].evaluate)
    # The cells of an entry have to be neighbours.
    order = list(dict.fromkeys(entry for entry, _ in cells))
    found = sorted(cells.items(), key=lambda item: order.index(item[0][0]))
    return [cell for _, cell in found], configs[0]


def _name(run: Run) -> str:
    folder = run.folder.resolve()
    seeded = folder.name.removeprefix("seed-").isdecimal() and folder.name.startswith("seed-")
    return folder.parent.name if seeded else folder.name


def _drawn(evaluation: Evaluation) -> tuple[object, ...]:
    """What has to be equal: prompts, seeds, and the base's values of the first metric."""
    base = evaluation.metrics[0]
    return (
        evaluation.prompts, evaluation.seeds, evaluation.negative_prompts, base.name,
        tuple(map(repr, base.base)),
    )  # fmt: skip
