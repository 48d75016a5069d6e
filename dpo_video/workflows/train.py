"""Train an adapter on preference pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

from accelerate import Accelerator

from dpo_video.data.build import Worker
from dpo_video.data.store import PairStore
from dpo_video.errors import RunError, UserError
from dpo_video.memory.compile import check_compile
from dpo_video.settings import TrainSettings
from dpo_video.strategies import PairBuilder, VideoModel
from dpo_video.support.atomic import write_text, writing
from dpo_video.training.diagnosis import Diagnosis
from dpo_video.training.listeners import Listener, saving
from dpo_video.training.reference_cache import ReferenceCacheReport
from dpo_video.training.report import StepReport
from dpo_video.training.run import train as train_loop
from dpo_video.training.sampler import trainable_pairs
from dpo_video.training.step import check_backward
from dpo_video.workflows.build import obtain_pairs
from dpo_video.workflows.config import Config
from dpo_video.workflows.estimate import choose_blocks, warn_if_too_large
from dpo_video.workflows.options import TrainOptions, configure, with_options
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.runs import PROMPTS, Run
from dpo_video.workflows.session import (
    accelerator_for,
    apply_labels,
    as_launched,
    builder_labeler,
    load_model,
)


@with_options
def train(
    pairs: PairBuilder | PairStore | Path | str | None = None,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    auto_resume: bool = False,
    listeners: Sequence[Listener] = (),
    progress: Progress = SILENT,
    stop: Callable[[], bool] = lambda: False,
    **options: Unpack[TrainOptions],
) -> Run:
    """Build pairs if necessary, and train an adapter on them.

    Args:
        pairs: Finished pairs (what `build_pairs` returned, or their folder or URL), or a pair
            builder or its name; "local" by default.
        out: The run's folder; by default runs/PAIRS-LOSS.
        resume: Resume the run in `out`.
        auto_resume: Resume the run in `out` if there is one, else start it.
        listeners: Called at the start, after every step and at the end, in every process.
        progress: Receives the progress.
        stop: Asked after every forward pass; True saves a checkpoint and ends the training.
        options: See `TrainOptions`.

    Raises:
        UserError: for options that do not fit together.
        RunError: if there is nothing to resume, or `out` holds a run that is not to be resumed.
        TrainingError: if the training cannot start, or has diverged.
    """
    folder = None if out is None else Path(out)
    if (resume or auto_resume) and folder is None:
        raise UserError("--resume needs --out RUN: dpo-video train --out runs/NAME --resume")
    exists = folder is not None and (folder / "run.toml").is_file()
    if resume and not exists:
        raise RunError(f"'{folder}' is not a run: it has no run.toml. Start it without --resume.")
    if exists and not (resume or auto_resume):
        raise RunError(
            f"'{folder}' holds a run already. Resume it with --resume, or name another --out."
        )
    resume = False
    if folder is not None and exists:
        options["config"] = options.get("config") or folder / "run.toml"
        # Without a checkpoint there is nothing to resume; the run starts again.
        resume = (folder / "checkpoints" / "latest").exists()
    config = configure("train", options, pairs)
    folder = folder or _free_folder(config)
    check_backward(config.loss, config.memory)
    builder_labeler(config)
    requested, config = config.memory, as_launched(config)
    accelerator = accelerator_for(config, folder)
    if not accelerator.is_main_process:
        progress = SILENT
    for note in (
        *config.notes,
        *_larger_batch(options.get("recipe"), config, accelerator.num_processes),
    ):
        progress.note(note)
    if config.memory != requested:
        progress.note(
            f"Set by the launcher: memory.shard={config.memory.shard}, "
            f"memory.offload={','.join(config.memory.offload) or 'none'}."
        )
    check_compile(config.memory, accelerator.device)
    if config.memory.checkpointing == "auto":
        config = choose_blocks(
            config, tier=options.get("tier"), device=accelerator.device, progress=progress
        )
    elif accelerator.is_main_process:
        warn_if_too_large(config, accelerator.device, progress)
    model = load_model(config, accelerator.device)
    part = Worker(number=accelerator.process_index, count=accelerator.num_processes)
    store = obtain_pairs(config, model, folder.parent / "pairs", worker=part, progress=progress)
    accelerator.wait_for_everyone()
    store.refresh()  # the pairs of the other processes
    labelled = apply_labels(config, store)
    config, store = labelled.config, labelled.store
    if config.train.labels:
        progress.note(
            f"{labelled.pairs} of {len(store)} pairs have labels ({', '.join(config.train.labels)})"
            + ("; the others are left out." if labelled.pairs < len(store) else ".")
        )
    write_run(config, store, folder, accelerator)
    return run_training(
        config,
        model,
        store,
        folder,
        accelerator,
        resume=resume,
        listeners=listeners,
        progress=progress,
        stop=stop,
    )


def _free_folder(config: Config) -> Path:
    """runs/PAIRS-LOSS, or the first of runs/PAIRS-LOSS-2, -3, ... that is not a run."""
    table = config.tables["pairs"]
    pairs = Path(table["store"]).name if config.pair_store else table["name"]
    name = f"{pairs}-{config.tables['loss']['name']}"
    folder, number = Path("runs") / name, 1
    while (folder / "run.toml").exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def write_run(config: Config, store: PairStore, folder: Path, accelerator: Accelerator) -> None:
    """Write the run's run.toml, and the prompts of its pairs."""
    if accelerator.is_main_process:
        with writing(folder):
            prompts = sorted({record.prompt for record in store.records})
            write_text(folder / PROMPTS, json.dumps(prompts, indent=0, ensure_ascii=False))
            write_text(folder / "run.toml", config.toml())


def run_training(
    config: Config,
    model: VideoModel,
    store: PairStore,
    folder: Path,
    accelerator: Accelerator,
    *,
    resume: bool,
    listeners: Sequence[Listener] = (),
    progress: Progress = SILENT,
    stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Train on prepared pairs with a loaded model; the loop of `train` and of `compare`."""
    settings = config.train
    _announce(config, folder, accelerator, progress)
    for note in _left_out(store, trainable_pairs(store, config.loss, model, settings), settings):
        progress.note(note)
    reports: list[StepReport] = []
    diagnosis = Diagnosis(settings.steps)
    for event in train_loop(
        model,
        store,
        config.loss,
        config.reference,
        settings,
        seed=config.run.seed,
        out=folder,
        accelerator=accelerator,
        memory=config.memory,
        resume=resume,
        on_reference_cache=_CacheNotes(progress, config),
        stop=stop,
        listeners=listeners,
    ):
        reports.append(event.report)
        diagnosis.add(event.report)
        progress.step(event, diagnosis.verdict(), settings.steps)
    with saving(folder):
        accelerator.end_training()
    stopped = stop() and (not reports or reports[-1].step < settings.steps)
    return Run(folder=folder, new_reports=tuple(reports), stopped=stopped)


def _announce(config: Config, folder: Path, accelerator: Accelerator, progress: Progress) -> None:
    tables, settings = config.tables, config.train
    beta = getattr(config.loss, "beta", None)
    slope = f" (slope beta = {beta:g} on the mean-squared-error margin)" if beta else ""
    pairs = settings.batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    progress.note(
        f"{tables['loss']['name']} loss{slope}, {tables['reference']['name']} reference, "
        f"{settings.steps} steps of {pairs} pairs, LoRA rank {settings.rank}, learning rate "
        f"{settings.learning_rate:g}, on {accelerator.device}. Run: {folder}"
    )
    if config.memory.quantization != "native":
        progress.note(
            f"The base model is quantized to {config.memory.quantization}: policy and reference "
            "differ from the published model, and the run is evaluated on the quantized one.",
            warning=True,
        )
    if config.memory.compile == "on":
        progress.note("The first step compiles the blocks, which may take minutes.")


def _larger_batch(recipe: str | None, config: Config, processes: int) -> list[str]:
    """A note on a recipe's batch if several processes each accumulate as many pairs."""
    train = config.train
    if recipe is None or processes == 1:
        return []
    pairs = train.batch_size * train.gradient_accumulation_steps
    return [
        f"Each of {processes} processes accumulates {pairs} pairs, {processes * pairs} a step. "
        f"For {pairs} a step, divide train.gradient_accumulation_steps by {processes}."
    ]


def _left_out(store: PairStore, pairs: Sequence[int], settings: TrainSettings) -> list[str]:
    """Notes on pairs that are not trained on, or teach some losses nothing."""
    notes, decided = [], store.decided()
    if left_out := len(decided) - len(pairs):
        notes.append(
            f"{left_out} of {len(store)} pairs are left out: they prefer a video in no more than "
            f"{settings.min_decided:.0%} of their one-second segments (train.min_decided)."
        )
    if left_out := len(store) - len(decided):
        notes.append(
            f"{left_out} of {len(store)} pairs are left out: they prefer neither video in any "
            "frame."
        )
    if even := sum(not store.preference(index).sum() for index in pairs):
        notes.append(
            f"{even} of {len(store)} pairs are even, with as many frames for one video as for the "
            "other: only a loss that looks at frames (segment) learns from them."
        )
    return notes


class _CacheNotes:
    """Reports how the cache of reference predictions fills; first its size and time."""

    def __init__(self, progress: Progress, config: Config) -> None:
        settings = config.train
        self.progress = progress
        self.draws = settings.steps * settings.gradient_accumulation_steps * settings.batch_size
        self.started = False

    def __call__(self, report: ReferenceCacheReport) -> None:
        """Take the loop's report."""
        if not self.started:
            self.started = True
            missing, uses = report.total - report.done, self.draws / report.total
            self.progress.note(
                f"Reference cache of {report.total} predictions ({report.size / 1e6:,.1f} MB, each "
                f"used {uses:.1f} times) in {report.folder}: "
                + (f"{missing} to compute, about {report.seconds:,.0f} s." if missing else "full.")
            )
            if report.done == 0 and uses < 2:
                self.progress.note(
                    "The cache saves this run no time, because each prediction is used so few "
                    "times; later runs on these pairs reuse it. For a single run, --reference "
                    "toggle is as fast.",
                    warning=True,
                )
        self.progress.update("reference cache", report.done, report.total)
