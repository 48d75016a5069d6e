"""Compare a run's tuned model with its base."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import tomli_w

from dpo_video import text
from dpo_video.data.build import Worker
from dpo_video.data.video import probe_video
from dpo_video.errors import RunError, UserError
from dpo_video.evaluation.evaluate import measure, measure_files
from dpo_video.evaluation.finished_videos import caption_of, paired_videos
from dpo_video.evaluation.human import preference_in
from dpo_video.evaluation.measuring import Measurement
from dpo_video.evaluation.results import BASE_MODEL, VIDEOS, Evaluation
from dpo_video.evaluation.verdict import EvaluationVerdict, judge_evaluation
from dpo_video.strategies import VideoModel
from dpo_video.support.claims import claim
from dpo_video.support.formatting import counted
from dpo_video.training.checkpoint import kept_adapter
from dpo_video.training.foreign_lora import peft_adapter
from dpo_video.training.run_dir import START, step_of
from dpo_video.training.trackers import log_evaluation
from dpo_video.types import Prompt
from dpo_video.workflows.config import Config
from dpo_video.workflows.distributed import launched_worker
from dpo_video.workflows.options import EvaluateOptions, checked, configure, with_options
from dpo_video.workflows.pairs import prompt_encodings
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.runs import Run, verdict_of
from dpo_video.workflows.session import evaluation_prompts, load_model, pick_device

_TESTABLE = 5  # frames: fewer are too few for the tests of dynamic_degree
_SAMPLED_BY = ("run", "backbone", "memory", "evaluate", "metric")
"""The tables that an evaluation without a training depends on."""
_DRAWN_BY = {
    "prompts": "--prompts", "num_prompts": "--num-prompts",
    "num_videos_per_prompt": "--num-videos-per-prompt", "batch_size": "--batch-size",
    "seed": "", "num_inference_steps": "", "guidance_scale": "",
}  # fmt: skip
"""Option of [evaluate] that says what is drawn, to its flag if it has one."""


@with_options
@checked
def evaluate(
    run: Run | Path | str | None = None,
    *,
    lora: Path | str | None = None,
    base: Path | str | None = None,
    tuned: Path | str | None = None,
    checkpoint: int | None = None,
    out: Path | str | None = None,
    page: bool = False,
    command: str | None = None,
    progress: Progress = SILENT,
    **options: Unpack[EvaluateOptions],
) -> Evaluation:
    """Compare a tuned model with its base on identical prompts and seeds.

    Writes evaluation.json, the videos of both models and a page, index.html. Finished videos are
    not drawn again: after an interruption the same call resumes.

    Args:
        run: The run or its folder.
        lora: Instead of a run, a LoRA of any origin for `backbone`: a .safetensors file, a folder,
            or a hub id.
        base: Instead of a run, a folder of finished videos of the base model.
        tuned: With `base`, a folder of videos of the same names. The prompt of NAME.mp4 is in
            NAME.txt, or else its name.
        checkpoint: The step to evaluate; the last checkpoint by default.
        out: The folder to write; by default RUN/evaluation, or RUN/evaluation-STEP, or below runs/.
        page: Afterwards, let people compare base and tuned blindly on the labelling page. Their
            answers are kept, and their win rate is on the report.
        command: The command that repeats this evaluation, for the page.
        progress: Receives the progress.
        options: See `EvaluateOptions`.

    Raises:
        UserError: for a wrong option, a video that is not finite, or if no metric is left.
        RunError: if there is no such run or checkpoint, or `out` has the evaluation of another.
        BusyError: if another process is writing the same evaluation.
    """
    folders = base is not None or tuned is not None
    named = (run is not None) + (lora is not None) + folders
    if named > 1:
        raise UserError(
            "A run, a LoRA (--lora) and two folders of videos (--base and --tuned) exclude one "
            "another; name one of them."
        )
    if not named or (base is None) != (tuned is None):
        raise UserError(
            "Name what to evaluate: a run (dpo-video evaluate RUN), a LoRA (--lora FILE --backbone "
            "NAME), or two folders of videos (--base DIR --tuned DIR)."
        )
    folder = evaluation_folder(run, checkpoint, out, lora=lora, tuned=tuned)
    if run is None and checkpoint is not None:
        raise UserError("--checkpoint needs a run: dpo-video evaluate RUN --checkpoint N")
    if run is not None:
        run = Run.open(run)
        options["config"] = options.get("config") or run.folder / "run.toml"
    elif base is not None and tuned is not None:
        _check_folders(Path(base), Path(tuned), folder, options)
        if options.get("backbone") is None:
            options["backbone"] = "animatediff"  # its metrics are for any video; nothing is loaded
    config = configure("evaluate", options, kinds=("backbone", "metric"))
    for note in config.notes:
        progress.note(note)
    check_targets(config)
    if run is not None:
        command = command or run.evaluate_command
        return evaluate_run(
            run, config, folder, checkpoint=checkpoint, command=command, progress=progress
        )
    worker = launched_worker()
    progress = SILENT if worker.number else progress
    with claim(
        folder, part=(worker.number, worker.count), instead="name another folder with --out"
    ):
        if lora is not None:
            command = command or text.command("evaluate", "--lora", str(lora))
            return _evaluate_lora(str(lora), config, folder, worker, command, progress)
        assert base is not None and tuned is not None
        command = command or text.command("evaluate", "--base", base, "--tuned", tuned)
        return _evaluate_files(Path(base), Path(tuned), config, folder, worker, command, progress)


def evaluation_folder(
    run: Run | Path | str | None,
    checkpoint: int | None = None,
    out: Path | str | None = None,
    *,
    lora: Path | str | None = None,
    tuned: Path | str | None = None,
) -> Path:
    """Where an evaluation is written."""
    if out is not None:
        return Path(out)
    if run is None:
        source = Path(str(lora or tuned)).resolve()
        name = source.stem
        if source.parent.parent.name == "checkpoints":  # RUN/checkpoints/STEP/adapter
            name = f"{source.parents[2].name}-{source.parent.name}"
        return Path("runs") / f"evaluation-{name}"
    parent = run.folder if isinstance(run, Run) else Path(run)
    return parent / ("evaluation" if checkpoint is None else f"evaluation-{checkpoint}")


def evaluate_run(
    run: Run,
    config: Config,
    folder: Path,
    *,
    command: str,
    checkpoint: int | None = None,
    base_folder: Path | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Evaluate a run with a resolved configuration.

    The base's videos are kept in `base_folder`, by default the run's, for its other checkpoints.
    """
    # What can be refused comes before the videos, which may take hours.
    rows = evaluation_prompts(config, progress.note)
    trained = tuple(sorted({*run.prompts} & {row.text for row in rows}))
    reports, toml = run.reports, run.toml
    versions = {**run.versions, **config.plugin_versions()}
    worker = launched_worker()
    if worker.number:
        progress = SILENT
    _check_folder(folder, run.name)
    with (
        claim(
            folder,
            part=(worker.number, worker.count),
            instead="name another folder with --out",
        ),
        kept_adapter(run.folder, checkpoint) as adapter,
    ):
        model = load_model(config, pick_device(config.run.device))
        start = run.folder / START
        started = start if start.is_dir() else None
        measured = _measure(
            model, adapter, rows, config, folder, base_folder or run.folder, worker, progress,
            start=started,
        )  # fmt: skip
        facts = {"Checkpoint": adapter.parent.name}
        if started is not None:
            facts[BASE_MODEL] = "with the LoRA that training started from"
        elif config.train.init_from is not None:
            progress.note(
                f"'{start}', the LoRA that training started from, is missing. The base is the "
                "model without it.",
                warning=True,
            )
        evaluation = _written(
            measured, config, folder, worker, progress,
            name=run.name, **_drawn(rows, model), trained_prompts=trained, command=command,
            training=tuple(reports), training_verdict=verdict_of(reports, toml), run_toml=toml,
            versions=versions, facts=_facts(config, model, **facts),
        )  # fmt: skip
        if not worker.number:
            _track(evaluation, run, config, step_of(adapter.parent), progress)
        return evaluation


def _check_folders(base: Path, tuned: Path, out: Path, options: EvaluateOptions) -> None:
    """Refuse options that have no effect on finished videos, and to write among them."""
    assigned = {str(path).partition("=")[0].strip() for path in options.get("set") or ()}
    for name in _DRAWN_BY:
        path = f"evaluate.{name}"
        if options.get(name) is not None or path in assigned:
            flag = "" if path in assigned else _DRAWN_BY[name]
            raise UserError(
                f"{flag or path} has no effect on finished videos (--base and --tuned), all of "
                "which are evaluated. Leave it out."
            )
    written = {out.resolve(), (out / VIDEOS).resolve()}
    if written & {base.resolve(), tuned.resolve()}:
        raise UserError(
            f"'{out}' holds the videos to evaluate. Name another folder to write with --out."
        )


def check_targets(config: Config) -> None:
    """A UserError unless a metric measures what training should improve."""
    if not any(metric.role == "target" for metric in config.metrics.values()):
        raise UserError(
            f"No verdict can be made by {' and '.join(config.metrics)} alone: none of them has the "
            "role of a target. Add one: --metric +warp_error"
        )


def _check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that has the evaluation of something else; that would be replaced."""
    try:
        other = Evaluation.load(folder).name
    except UserError:  # none, or a damaged one
        return
    if other != name:
        raise RunError(
            f"'{folder}' holds the evaluation of '{other}'. Name another folder with --out."
        )


def _track(evaluation: Evaluation, run: Run, config: Config, step: int, progress: Progress) -> None:
    """Show the verdict and the means in the run's tracker."""
    train = config.train
    values: dict[str, float] = {}
    for metric in evaluation.metrics:
        values[f"evaluation/{metric.name}/base"] = metric.difference.base_mean
        values[f"evaluation/{metric.name}/tuned"] = metric.difference.tuned_mean
    verdict = evaluation.verdict
    try:
        log_evaluation(
            train.report_to, run.folder, train.project,
            train.run_name or run.folder.resolve().name,
            text="\n\n".join((verdict.headline, *verdict.details)), values=values, step=step,
        )  # fmt: skip
    except Exception as error:  # hours of videos must not be lost to a tracker
        progress.note(
            f"The evaluation could not be shown in {train.report_to} "
            f"({type(error).__name__}: {error}). Its files are complete.",
            warning=True,
        )


def _evaluate_lora(
    lora: str, config: Config, folder: Path, worker: Worker, command: str, progress: Progress
) -> Evaluation:
    rows = evaluation_prompts(config, progress.note)
    _check_folder(folder, Path(lora).name)
    model = load_model(config, pick_device(config.run.device))
    with tempfile.TemporaryDirectory(prefix="dpo-video-") as scratch:
        adapter = peft_adapter(lora, model, Path(scratch) / "adapter")
        measured = _measure(model, adapter, rows, config, folder, folder, worker, progress)
    return _written(
        measured, config, folder, worker, progress,
        name=Path(lora).name, **_drawn(rows, model), command=command,
        run_toml=tomli_w.dumps({name: config.tables[name] for name in _SAMPLED_BY}),
        facts=_facts(config, model, LoRA=lora),
    )  # fmt: skip


def _evaluate_files(
    base: Path,
    tuned: Path,
    config: Config,
    folder: Path,
    worker: Worker,
    command: str,
    progress: Progress,
) -> Evaluation:
    name = f"{tuned.name} against {base.name}"
    _check_folder(folder, name)
    pairs = paired_videos(base, tuned)
    infos = [probe_video(first) for first, _ in pairs]
    prompts = tuple(caption_of(first, second) for first, second in pairs)
    measured = measure_files(
        [first for first, _ in pairs],
        [second for _, second in pairs],
        prompts,
        config.metrics,
        config.evaluate,
        folder / VIDEOS,
        fps=infos[0].fps,
        worker=worker,
        on_progress=lambda done: progress.update("videos", done, 2 * len(pairs)),
    )
    return _written(
        measured, config, folder, worker, progress,
        name=name, prompts=prompts, seeds=(),
        frames=max(info.frames for info in infos), fps=infos[0].fps, command=command,
        run_toml="", facts={"Base": str(base), "Tuned": str(tuned)},
    )  # fmt: skip


def _measure(
    model: VideoModel,
    adapter: Path,
    rows: Sequence[Prompt],
    config: Config,
    folder: Path,
    base_folder: Path,
    worker: Worker,
    progress: Progress,
    start: Path | None = None,
) -> Measurement:
    return measure(
        model,
        adapter,
        config.metrics,
        rows,
        config.evaluate,
        folder / VIDEOS,
        start=start,
        base_folder=base_folder,
        encodings=prompt_encodings(model, config),
        drawn_from=[config.tables["backbone"], config.run.deterministic],
        worker=worker,
        on_progress=lambda done: progress.update("videos", done, 2 * len(rows)),
        note=progress.note,
    )


def _drawn(rows: Sequence[Prompt], model: VideoModel) -> dict[str, Any]:
    """The fields of an evaluation that say what was drawn."""
    negatives = tuple(row.negative_prompt for row in rows)
    return {
        "prompts": tuple(row.text for row in rows),
        "seeds": tuple(row.seed or 0 for row in rows),
        "negative_prompts": negatives if any(text is not None for text in negatives) else (),
        "frames": model.shape.frames,
        "fps": model.shape.fps,
    }


def _written(
    measured: Measurement,
    config: Config,
    folder: Path,
    worker: Worker,
    progress: Progress,
    *,
    command: str,
    trained_prompts: tuple[str, ...] = (),
    **fields: Any,
) -> Evaluation:
    """The evaluation; one process writes it."""
    least = config.evaluate.min_prompts
    evaluation = Evaluation(
        metrics=measured.metrics,
        min_prompts=least,
        verdict=_verdict(
            measured,
            progress,
            fields["frames"],
            min_prompts=least,
            trained_on=len(trained_prompts),
            finished=not fields["seeds"],
        ),
        trained_prompts=trained_prompts,
        command=text.without_credentials(command),
        preference=preference_in(folder, len(fields["prompts"])),
        **fields,
    )
    if not worker.number:
        evaluation.save(folder)
    return evaluation


def _verdict(
    measured: Measurement, progress: Progress, frames: int, **options: Any
) -> EvaluationVerdict:
    for metric in measured.left_out:
        if metric.error is not None:  # for the plugin's author
            progress.note("".join(traceback.format_exception(metric.error)), warning=True)
    verdict = judge_evaluation(measured.metrics, **options)
    reasons = [metric.reason for metric in measured.left_out]
    if frames < _TESTABLE and any(metric.name == "dynamic_degree" for metric in measured.metrics):
        reasons.append(
            f"Videos of {counted(frames, 'frame')} are too short for dynamic degree to tell "
            f"flicker from motion; that takes {_TESTABLE} frames."
        )
    return verdict.model_copy(update={"details": (*verdict.details, *reasons)})


def _facts(config: Config, model: VideoModel, **facts: str) -> dict[str, str]:
    settings, defaults = config.evaluate, model.sampling
    steps = settings.num_inference_steps or defaults.num_inference_steps
    scale = settings.guidance_scale
    guidance = defaults.guidance_scale if scale is None else scale
    facts["Sampling"] = f"{counted(steps, 'step')}, guidance scale {guidance:g}"
    precision = config.train.mixed_precision
    facts["Precision"] = "fp32" if precision == "no" else precision
    facts["Device"] = str(model.device)
    if config.memory.quantization != "native":
        facts["Base quantized to"] = config.memory.quantization
    return facts
