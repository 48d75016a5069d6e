"""Train an adapter on preference pairs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Unpack

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dpo_video import registry
from dpo_video.data.build import Worker
from dpo_video.data.films import SUFFIXES
from dpo_video.data.store import PairStore
from dpo_video.errors import BusyError, RunError, TrainingError, UserError
from dpo_video.extensions import Listener, ListenerFactory
from dpo_video.memory.compile import check_compile
from dpo_video.registry import local
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Loss, PairBuilder, VideoModel
from dpo_video.support.atomic import write_text, writing
from dpo_video.support.claims import claim
from dpo_video.support.formatting import counted
from dpo_video.support.interrupts import StopSignal, deferred
from dpo_video.support.report import StepReport
from dpo_video.training.diagnosis import Diagnosis, TrainingState, TrainingVerdict
from dpo_video.training.listeners import saving
from dpo_video.training.lora import check_lora, starting_rank
from dpo_video.training.optimizer import check_offload
from dpo_video.training.reference_cache import ReferenceCacheReport
from dpo_video.training.run import check_without_reference
from dpo_video.training.run import train as train_loop
from dpo_video.training.run_dir import checkpoints, read_log, resume_command
from dpo_video.training.sampler import trainable_pairs
from dpo_video.training.step import check_backward
from dpo_video.training.trackers import log_text
from dpo_video.types import PairErrors
from dpo_video.workflows.build import obtain_pairs
from dpo_video.workflows.config import Config
from dpo_video.workflows.distributed import is_main_process, process_count
from dpo_video.workflows.estimate import choose_blocks, warn_if_too_large
from dpo_video.workflows.launcher import as_launched, hidden, launcher_request, notes_on
from dpo_video.workflows.options import TrainOptions, checked, configure, with_options
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.resume import Resumption, options_of
from dpo_video.workflows.runs import PROMPTS, Run
from dpo_video.workflows.session import (
    accelerator_for,
    apply_labels,
    builder_labeler,
    load_model,
    start_trackers,
    validation_prompts,
)

_ALARMING = frozenset(
    {TrainingState.DIVERGED, TrainingState.REJECTED_DOMINANT, TrainingState.SATURATED}
)
"""States that a tracker alerts to while the run goes on."""


@with_options
@checked
def train(
    pairs: PairBuilder | PairStore | Path | str | None = None,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    auto_resume: bool = False,
    accept_changes: bool = False,
    listeners: Sequence[Listener | ListenerFactory | str] | None = (),
    progress: Progress = SILENT,
    stop: Callable[[], bool] = lambda: False,
    **options: Unpack[TrainOptions],
) -> Run:
    """Build pairs if necessary, and train an adapter on them.

    SIGINT, SIGTERM and SIGHUP save a checkpoint before they are handled.

    Args:
        pairs: Finished pairs (what `build_pairs` returned, or their folder or URL), or a pair
            builder or its name; "local" by default.
        out: The run's folder; by default a new one, runs/PAIRS-LOSS.
        resume: Resume the run in `out`.
        auto_resume: Resume the run in `out` if there is one, else start it.
        accept_changes: Resume with options that change what the run learns from here on.
        listeners: Listeners or their names, called at the start, after every step and checkpoint,
            and at the end, in every process.
        progress: Receives the progress.
        stop: Asked after every forward pass; True saves a checkpoint and ends the training.
        options: See `TrainOptions`.

    Raises:
        UserError: for options that do not fit together.
        BusyError: if another process is training in `out`.
        RunError: if there is nothing to resume, or `out` holds a run that is not to be resumed, or
            the run was trained with other options.
        TrainingError: if the training cannot start, or has diverged.
    """
    if (resume or auto_resume) and out is None:
        raise UserError("--resume needs --out RUN: dpo-video train --out runs/NAME --resume")
    main = is_main_process()
    if not main:
        progress = SILENT
    request = launcher_request()
    own = [each for each in listeners or () if isinstance(each, Listener)]
    chosen = {"listeners": [each for each in listeners or () if each not in own]}
    with ExitStack() as stack:
        stack.enter_context(hidden())
        if out is None:
            config = configure("train", {**options, **chosen}, pairs, launched=request.options)
            folder = _new_folder(config, stack, claimed=main)
        else:
            folder = Path(out)
            _check_folder(folder)
            if main:  # of several processes; the others write nothing
                stack.enter_context(claim_run(folder, progress))
            if _exists(folder, resume=resume, auto_resume=auto_resume, progress=progress):
                options["config"] = options.get("config") or folder / "run.toml"
            config = configure("train", {**options, **chosen}, pairs, launched=request.options)
        check_backward(config.loss, config.memory)
        check_offload(config.optimizer, config.memory)
        if config.tables["reference"]["name"] == "none":
            check_without_reference(config.loss)
        check_lora(config.train, config.memory)
        builder_labeler(config)
        validation_prompts(config, progress.note)
        config = as_launched(config, request)
        resumption = Resumption.of(folder, partial(progress.note, warning=True))
        resumption.check(config, process_count(), accept=accept_changes)
        accelerator = accelerator_for(config, folder)
        if out is None and accelerator.num_processes > 1:
            folder = Path(broadcast_object_list([str(folder)])[0])
            resumption = replace(resumption, folder=folder)
        for note in (
            *config.notes,
            *notes_on(config, request),
            *_larger_batch(options.get("recipe"), config, accelerator.num_processes),
        ):
            progress.note(note)
        check_compile(config.memory, accelerator.device)
        if config.memory.checkpointing == "auto":
            config = choose_blocks(
                config, tier=options.get("tier"), device=accelerator.device, progress=progress
            )
        elif accelerator.is_main_process:
            warn_if_too_large(config, accelerator.device, progress)
        model = load_model(config, accelerator.device)
        config = started_from(config, model)
        store = obtain_pairs(
            config,
            model,
            folder.parent / "pairs",
            wait=True,
            worker=Worker(number=accelerator.process_index, count=accelerator.num_processes),
            progress=progress,
            resumed=resumption.checkpoint,
        )
        accelerator.wait_for_everyone()
        store.refresh()  # the pairs of the other processes
        labelled = apply_labels(config, store)
        config, store = labelled.config, labelled.store
        if config.train.labels:
            progress.note(
                f"{labelled.pairs} of {len(store)} pairs have labels "
                f"({', '.join(config.train.labels)})"
                + ("; the others are left out." if labelled.pairs < len(store) else ".")
            )
        try:
            return run_training(
                config,
                model,
                store,
                resumption,
                accelerator,
                listeners=own,
                progress=progress,
                stop=stop,
            )
        except StopSignal as signal:
            signal.command = resume_command(folder)
            raise


def _check_folder(folder: Path) -> None:
    """Refuse a folder of pairs or videos, in which samples of the run would pass for clips."""
    if not folder.is_dir() or (folder / "run.toml").exists():
        return
    found = "pairs" if (folder / "store.json").exists() else ""
    if not found and any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
        found = "videos"
    if found:
        raise RunError(
            f"'{folder}' holds {found}, and is no folder of a run. Name another one with --out."
        )


def _exists(folder: Path, *, resume: bool, auto_resume: bool, progress: Progress) -> bool:
    """Whether a folder has a run to resume.

    Raises:
        RunError: if that is not what was asked for.
    """
    exists, saved = (folder / "run.toml").is_file(), bool(checkpoints(folder))
    if saved and not exists:
        raise RunError(
            f"'{folder}' has checkpoints but no run.toml. Copy the run.toml of that run there, or "
            "name another --out."
        )
    if resume and not exists:
        raise RunError(f"'{folder}' is not a run: it has no run.toml. Start it without --resume.")
    if saved and not (resume or auto_resume):
        raise RunError(
            f"'{folder}' holds a run already. Resume it with --resume, or name another --out."
        )
    if exists and not saved:
        progress.note(f"'{folder}' has no checkpoint yet: the run starts at step 0.")
    return exists and (resume or auto_resume)


def claim_run(folder: Path, progress: Progress) -> AbstractContextManager[bool]:
    """Be the only process that trains in a run's folder.

    Raises:
        BusyError: if another process is training there.
    """
    # A launcher that restarts processes may do so before the lost ones have ended.
    patience = 30.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
    return claim(
        folder, instead="name another folder with --out", patience=patience, note=progress.note
    )


def _new_folder(config: Config, stack: ExitStack, *, claimed: bool) -> Path:
    """runs/PAIRS-LOSS, or the first of runs/PAIRS-LOSS-2, -3, ... that is free."""
    table = config.tables["pairs"]
    pairs = Path(table["store"]).name if config.pair_store else registry.short_name(table["name"])
    name = f"{pairs}-{registry.short_name(config.tables['loss']['name'])}"
    for number in count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if (folder / "run.toml").exists():
            continue
        if not claimed:
            return folder
        with suppress(BusyError), ExitStack() as attempt:
            attempt.enter_context(claim(folder))
            if not (folder / "run.toml").exists():  # another process may have just ended there
                stack.push(attempt.pop_all())
                return folder
    raise AssertionError("unreachable")


def write_run(
    config: Config, store: PairStore, folder: Path, changes: Sequence[Mapping[str, Any]]
) -> None:
    """Write a run's run.toml, and the prompts of its pairs."""
    with writing(folder):
        prompts = sorted({record.prompt for record in store.records})
        write_text(folder / PROMPTS, json.dumps(prompts, indent=0, ensure_ascii=False))
        local.save(config.tables, folder)
        write_text(folder / "run.toml", config.toml(changes))


def run_training(
    config: Config,
    model: VideoModel,
    store: PairStore,
    resumption: Resumption,
    accelerator: Accelerator,
    *,
    listeners: Sequence[Listener] = (),
    progress: Progress = SILENT,
    stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Train on prepared pairs with a loaded model; the loop of `train` and of `compare`.

    run.toml is written once everything was checked.
    """
    settings, folder = config.train, resumption.folder
    changes = resumption.changes(config, accelerator.num_processes)
    validation = validation_prompts(config)
    _announce(config, folder, accelerator, progress)
    trained_on = trainable_pairs(store, config.loss, model, settings)
    for note in _left_out(store, trained_on, settings, config.loss):
        progress.note(note)
    reports: list[StepReport] = []
    ended = ""
    diagnosis = Diagnosis(settings.steps, options=config.tables["loss"])
    alarmed = set[TrainingState]()

    def begin(step: int) -> None:
        if changes.paths:
            progress.note(f"Changed at step {step}: {changes.text()}.", warning=True)
        if accelerator.is_main_process:
            entries = [changes.entry()] if changes.paths else []
            write_run(config, store, folder, [*resumption.history, *entries])
            for report in read_log(folder):
                if report.step <= step:
                    diagnosis.add(report)
        start_trackers(accelerator, config, folder, resumed=step > 0)

    try:
        with deferred() as signalled:
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
                timesteps=config.timesteps,
                optimizer=config.optimizer,
                schedule=config.schedule,
                resume=resumption.checkpoint or False,
                options=options_of(config, accelerator.num_processes),
                on_ready=begin,
                on_reference_cache=_CacheNotes(progress, config),
                stop=lambda: stop() or signalled(),
                validation_prompts=validation,
                listeners=[*config.listeners.values(), *listeners],
            ):
                reports.append(event.report)
                ended = event.ended
                diagnosis.add(event.report)
                verdict = diagnosis.verdict()
                progress.step(event, verdict, settings.steps)
                if verdict.state in _ALARMING and verdict.state not in alarmed:
                    alarmed.add(verdict.state)
                    with saving(folder):
                        _track(accelerator, verdict, alert=True)
            if reports and all(report.skipped for report in reports):
                raise TrainingError(
                    f"None of {len(reports)} steps changed the adapter: every loss or gradient was "
                    "not finite. Check the pairs (dpo-video check) and the options of the loss, or "
                    "set train.mixed_precision=bf16 or no."
                )
            with saving(folder):
                if reports:
                    _track(accelerator, diagnosis.verdict())
                accelerator.end_training()
    except StopSignal as signal:
        if reports:
            signal.done = f"Stopped and saved at step {reports[-1].step}."
        raise
    if ended:
        progress.note(f"Ended at step {reports[-1].step} of {settings.steps}. {ended}")
    last = reports[-1].step if reports else resumption.step
    stopped = last < settings.steps and not ended
    return Run(folder=folder, new_reports=tuple(reports), stopped=stopped)


def _track(accelerator: Accelerator, verdict: TrainingVerdict, *, alert: bool = False) -> None:
    """Show a verdict in the tracker."""
    text = f"{verdict.state}: {verdict.seen} {verdict.change}"
    log_text(accelerator, "diagnosis", text, step=verdict.step, alert=alert)


def started_from(config: Config, model: VideoModel) -> Config:
    """The configuration with rank and alpha of the LoRA that the run starts from, if any."""
    settings = starting_rank(config.train, model)
    numbers = {"rank": settings.rank, "alpha": settings.alpha}
    tables = {**config.tables, "train": {**config.tables["train"], **numbers}}
    return replace(config, train=settings, tables=tables)


def _announce(config: Config, folder: Path, accelerator: Accelerator, progress: Progress) -> None:
    tables, settings = config.tables, config.train
    beta = getattr(config.loss, "beta", None)
    slope = f" (slope beta = {beta:g} on the mean-squared-error margin)" if beta else ""
    slope = slope if config.loss.needs_reference else ""
    pairs = settings.batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    reference = tables["reference"]["name"] if config.loss.needs_reference else "none"
    reference = "no" if reference == "none" else reference
    start = f" from {settings.init_from}" if settings.init_from else ""
    progress.note(
        f"{tables['loss']['name']} loss{slope}, {reference} reference, "
        f"{counted(settings.steps, 'step')} of {counted(pairs, 'pair')}, LoRA rank "
        f"{settings.rank}{start}, learning rate {settings.learning_rate:g}, on "
        f"{accelerator.device}. Run: {folder}"
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
        f"Each of {processes} processes accumulates {counted(pairs, 'pair')}, "
        f"{processes * pairs} a step. For {pairs} a step, divide "
        f"train.gradient_accumulation_steps by {processes}."
    ]


def _left_out(
    store: PairStore, pairs: Sequence[int], settings: TrainSettings, loss: Loss
) -> list[str]:
    """Notes on pairs that are not trained on, or teach some losses nothing.

    Raises:
        TrainingError: if the loss needs a preferred video, and no pair has one.
    """
    notes, decided = [], store.decided()
    if loss.sees_groups and not store.has_groups:
        notes.append(
            "These are pairs and no groups, so this loss compares two videos each. Groups are "
            "built by --pairs ranked --set pairs.keep=all."
        )
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
    even = sum(not store.preference(index).sum() for index in pairs)
    if even == len(pairs) > 0 and not _looks_at_frames(loss):
        raise TrainingError(
            f"All {even} pairs are even, with as many frames for one video as for the other, so "
            "this loss learns nothing from them. Use --loss segment, or other labels."
        )
    if even:
        notes.append(
            f"{even} of {len(store)} pairs are even, with as many frames for one video as for the "
            "other: only a loss that looks at frames (segment) learns from them."
        )
    return notes


def _looks_at_frames(loss: Loss) -> bool:
    """Whether a loss has a gradient on a pair with one frame for each of its videos."""
    shape = (1, 1, 2, 1, 1)
    policy = [torch.full(shape, 1.0 + n, requires_grad=True) for n in range(2)]
    errors = PairErrors(
        policy_first=policy[0], policy_second=policy[1],
        reference_first=torch.zeros(shape), reference_second=torch.zeros(shape),
        policy_product=torch.zeros(shape), preference=torch.tensor([[1.0, -1.0]]),
        region=torch.ones(shape), strength=torch.ones(1),
        timestep=torch.ones(1), signal=torch.ones(1), noise=torch.ones(1), progress=torch.zeros(1),
    )  # fmt: skip
    value = loss(errors).loss.sum()
    if not value.requires_grad:
        return False
    slopes = torch.autograd.grad(value, policy, allow_unused=True)
    return any(slope is not None and bool(slope.any()) for slope in slopes)


class _CacheNotes:
    """Reports how the cache of reference predictions fills; first its size and time."""

    def __init__(self, progress: Progress, config: Config) -> None:
        settings = config.train
        self.progress = progress
        self.draws = settings.steps * settings.gradient_accumulation_steps * settings.batch_size
        self.started = False

    def __call__(self, report: ReferenceCacheReport) -> None:
        """Take the loop's report."""
        if report.waiting:
            self.progress.note(report.waiting)
            return
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
