"""Build, train and evaluate several entries with the same seeds and prompts."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dpo_video.errors import UserError
from dpo_video.evaluation.compare import Comparison
from dpo_video.evaluation.results import Evaluation
from dpo_video.evaluation.rows import Cell
from dpo_video.support.atomic import write_text, writing
from dpo_video.support.claims import claim
from dpo_video.training.run_dir import checkpoints
from dpo_video.workflows.build import obtain_pairs
from dpo_video.workflows.compare_runs import check_finished, finished_cells
from dpo_video.workflows.config import Config
from dpo_video.workflows.entries import chosen, read_entries
from dpo_video.workflows.estimate import choose_blocks
from dpo_video.workflows.evaluate import check_targets, evaluate_run
from dpo_video.workflows.launcher import refuse_launcher
from dpo_video.workflows.options import checked
from dpo_video.workflows.presets import Tables
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.resume import Resumption
from dpo_video.workflows.session import (
    accelerator_for,
    builder_labeler,
    evaluation_prompts,
    load_model,
    pick_device,
)
from dpo_video.workflows.tables import CHANGES
from dpo_video.workflows.train import claim_run, run_training, started_from

_JUDGING = ("tolerance", "min_effect", "min_effects", "min_prompts")
"""Options of [evaluate] that change a verdict and not what was measured."""


@checked
def compare(
    entries: Sequence[Path | str] | None = None,
    *,
    recipe: str | None = None,
    only: Sequence[str] | None = None,
    training_seeds: Sequence[int] | None = None,
    steps: int | None = None,
    prompts: Path | str | None = None,
    num_prompts: int | None = None,
    num_videos_per_prompt: int | None = None,
    min_effect: float | None = None,
    tolerance: float | None = None,
    min_prompts: int | None = None,
    selection_prompts: int | None = None,
    selection_seeds: Sequence[int] | None = None,
    out: Path | str = "runs/compare",
    device: str | None = None,
    rebuild: bool | None = None,
    accept_pairs: bool | None = None,
    progress: Progress = SILENT,
) -> Comparison:
    """Build, train and evaluate several entries with the same seeds and prompts.

    Every cell is a run of its own, OUT/ENTRY/seed-N. Finished cells are not run again.

    Folders of runs in place of files are compared by the evaluations that they have. Nothing is
    trained or drawn.

    Args:
        entries: TOML files: entries, or a run.toml; those of the package by default. An entry is a
            table: [NAME], pairs = "local", set = ["train.learning_rate=1e-4"], seeds = [0, 1, 2].
            The table [selection] with prompts = 16 and seeds = [0] gives defaults of
            `selection_prompts` and `selection_seeds`.
        recipe: The recipe of every entry that names none; an entry names one with
            recipe = "densedpo".
        only: Names of the entries to run; all by default.
        training_seeds: Seeds of pairs and training, for all entries.
        steps: Optimizer steps of every entry.
        prompts: File of evaluation prompts, as `evaluate.prompts`.
        num_prompts: As `evaluate.num_prompts`.
        num_videos_per_prompt: As `evaluate.num_videos_per_prompt`.
        min_effect: As `evaluate.min_effect`. Thresholds can be changed for finished cells.
        tolerance: As `evaluate.tolerance`.
        min_prompts: As `evaluate.min_prompts`.
        selection_prompts: Number of prompts that choose the best entry. The report is on the other
            prompts, which play no part in the choice.
        selection_seeds: Training seeds that choose, in the same sense. An entry without others is
            not reported.
        out: The folder of all runs, with comparison.json, comparison.md, frontier.svg and
            index.html.
        device: As for training.
        rebuild: As `build.rebuild`.
        accept_pairs: As `build.accept_pairs`.
        progress: Receives the progress.

    Raises:
        UserError: for an entry that cannot be read or resolved, before the first one runs.
        BusyError: if another process is writing `out`.
    """
    refuse_launcher("compare")
    folder = Path(out)
    flags = {
        "train.steps": steps,
        "run.device": device,
        "build.rebuild": rebuild,
        "build.accept_pairs": accept_pairs,
        "evaluate.prompts": None if prompts is None else str(prompts),
        "evaluate.num_prompts": num_prompts,
        "evaluate.num_videos_per_prompt": num_videos_per_prompt,
        "evaluate.min_effect": min_effect,
        "evaluate.tolerance": tolerance,
        "evaluate.min_prompts": min_prompts,
    }
    runs = [Path(entry) for entry in entries or () if Path(entry).is_dir()]
    if runs:
        given = {
            "recipe": recipe, "only": only, "training_seed": training_seeds,
            "selection_prompts": selection_prompts, "selection_seed": selection_seeds,
        }  # fmt: skip
        check_finished(runs, entries or (), {**flags, **given})
        cells, config = finished_cells(runs, flags)
        with claim(folder, instead="name another folder with --out"):
            return _written(cells, config, folder, 0, ())
    found = read_entries(entries)
    if selection_prompts is None:
        selection_prompts = found.selection_prompts
    if not selection_seeds:
        selection_seeds = found.selection_seeds
    # All entries are resolved before the first one runs: a typo must not surface after an hour.
    work, notes = [], dict[str, None]()
    for entry in chosen(found.entries, only):
        for seed in training_seeds or entry.seeds:
            config = entry.resolve({**flags, "run.seed": seed}, recipe)
            notes.update(dict.fromkeys(config.notes))
            check_targets(config)
            evaluation_prompts(config, lambda text: notes.update({text: None}))
            where = pick_device(config.run.device)
            # With a number in place of checkpointing=auto, as run.toml will have it.
            work.append((entry.name, seed, choose_blocks(config, device=where, progress=progress)))
    _check_selection(work, selection_prompts, selection_seeds)
    for note in notes:
        progress.note(note)
    with claim(folder, instead="name another folder with --out"):
        for name, seed, config in work:
            builder_labeler(config)
            _check_same(folder / name / f"seed-{seed}", config)
        return _compare(work, folder, selection_prompts, selection_seeds, progress)


def _compare(
    work: Sequence[tuple[str, int, Config]],
    folder: Path,
    selection_prompts: int,
    selection_seeds: Sequence[int],
    progress: Progress,
) -> Comparison:
    cells = []
    for name, seed, config in work:
        run = folder / name / f"seed-{seed}"
        evaluation = _finished(run, config)
        if evaluation is None:
            progress.note(f"{name}, seed {seed}")
            evaluation = _measure(config, run, folder, progress)
        cells.append(Cell.of(name, seed, evaluation, config.evaluate))
    return _written(cells, work[0][2], folder, selection_prompts, selection_seeds)


def _written(
    cells: Sequence[Cell],
    config: Config,
    folder: Path,
    selection_prompts: int,
    selection_seeds: Sequence[int],
) -> Comparison:
    """The comparison, which is written to `folder`."""
    comparison = Comparison.of(
        cells,
        machine=f"{platform.system()} {platform.machine()}, {config.run.device} device",
        versions=tomllib.loads(config.toml())["versions"],
        selection_prompts=selection_prompts,
        selection_seeds=selection_seeds,
    )
    with writing(folder):
        write_text(folder / "comparison.json", comparison.model_dump_json(indent=1) + "\n")
        write_text(folder / "comparison.md", comparison.markdown())
        if comparison.drawable:
            write_text(folder / "frontier.svg", comparison.picture())
        comparison.page(folder / "index.html")
    return comparison


def _check_selection(
    work: Sequence[tuple[str, int, Config]], prompts: int, seeds: Sequence[int]
) -> None:
    """A UserError unless there is something to choose by, and something else to report."""
    if prompts:
        fewest = min(len({row.text for row in evaluation_prompts(config)}) for *_, config in work)
        if not 2 <= prompts <= fewest - 2:
            raise UserError(
                f"{prompts} of {fewest} prompts cannot choose: choosing and reporting need 2 or "
                "more each. Change --selection-prompts, or evaluate more prompts (--num-prompts)."
            )
    trained = {seed for _, seed, _ in work}
    if seeds and not trained & set(seeds):
        raise UserError(
            f"No entry is trained with a seed that chooses ({', '.join(map(str, seeds))}). Add "
            "one to the seeds of the entries, or change --selection-seed."
        )
    if not trained - set(seeds):
        raise UserError(
            "Every training seed chooses, so there is none to report. Add seeds to the entries."
        )


def _finished(folder: Path, config: Config) -> Evaluation | None:
    """The evaluation of an earlier call with the same configuration."""
    if not (folder / "evaluation" / "evaluation.json").exists():
        return None
    evaluation = Evaluation.load(folder / "evaluation")
    rows = evaluation_prompts(config)
    asked = [(row.text, row.seed, row.negative_prompt) for row in rows]
    negatives = evaluation.negative_prompts or (None,) * len(evaluation.prompts)
    if asked != [*zip(evaluation.prompts, evaluation.seeds, negatives, strict=True)]:
        raise _other_settings(folder)
    return evaluation


def _check_same(folder: Path, config: Config) -> None:
    """Refuse a cell that was trained or evaluated with other settings."""
    started = checkpoints(folder) or (folder / "evaluation" / "evaluation.json").exists()
    if not started or not (folder / "run.toml").is_file():
        return
    before = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))
    for record in ("versions", CHANGES):
        before.pop(record, None)
    if _measured(before) != _measured(config.tables):
        raise _other_settings(folder)
    _finished(folder, config)


def _other_settings(folder: Path) -> UserError:
    return UserError(
        f"'{folder}' was run with other settings than this entry's. Name another --out, or "
        "delete that folder to run it again."
    )


def _measured(tables: Tables) -> Tables:
    """The tables without what changes no measured value, and what a LoRA to start from brings."""
    evaluate = {k: v for k, v in tables.get("evaluate", {}).items() if k not in _JUDGING}
    others = {"rebuild", "accept_pairs"}
    build = {k: v for k, v in tables.get("build", {}).items() if k not in others}
    train, brought = tables.get("train", {}), {"rank", "alpha"}
    if "init_from" in train:
        train = {k: v for k, v in train.items() if k not in brought}
    return {**tables, "build": build, "evaluate": evaluate, "train": train}


def _measure(config: Config, folder: Path, out: Path, progress: Progress) -> Evaluation:
    accelerator = accelerator_for(config, folder)
    model = load_model(config, accelerator.device)
    config = started_from(config, model)
    with claim_run(folder, progress):
        resumption = Resumption.of(folder, partial(progress.note, warning=True))
        resumption.check(config, accelerator.num_processes, accept=False)
        store = obtain_pairs(
            config,
            model,
            out / "pairs",
            wait=True,
            progress=progress,
            resumed=resumption.checkpoint,
        )
        run = run_training(config, model, store, resumption, accelerator, progress=progress)
        return evaluate_run(
            run,
            config,
            folder / "evaluation",
            command=run.evaluate_command,
            base_folder=out,
            progress=progress,
        )
