"""Compare a run's tuned model with its base."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Unpack

from dpo_video import text
from dpo_video.evaluation.evaluate import measure
from dpo_video.evaluation.measuring import Measurement
from dpo_video.evaluation.results import VIDEOS, Evaluation
from dpo_video.evaluation.verdict import EvaluationVerdict, judge_evaluation
from dpo_video.strategies import VideoModel
from dpo_video.support.claims import claim
from dpo_video.training.checkpoint import kept_adapter
from dpo_video.workflows.config import Config
from dpo_video.workflows.distributed import launched_worker
from dpo_video.workflows.options import EvaluateOptions, checked, configure, with_options
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.runs import Run, verdict_of
from dpo_video.workflows.session import evaluation_prompts, load_model, pick_device


@with_options
@checked
def evaluate(
    run: Run | Path | str,
    *,
    checkpoint: int | None = None,
    out: Path | str | None = None,
    command: str | None = None,
    progress: Progress = SILENT,
    **options: Unpack[EvaluateOptions],
) -> Evaluation:
    """Compare a run's tuned model with its base on identical prompts and seeds.

    Writes evaluation.json, the videos of both models and a self-contained page, index.html.

    Args:
        run: The run or its folder.
        checkpoint: The step to evaluate; the last checkpoint by default.
        out: The folder to write; by default RUN/evaluation, or RUN/evaluation-STEP.
        command: The command that repeats this evaluation, for the page.
        progress: Receives the progress.
        options: See `EvaluateOptions`.

    Raises:
        UserError: for a wrong option, a video that is not finite, or if no metric is left.
        RunError: if there is no such run or checkpoint.
        BusyError: if another process is writing the same evaluation.
    """
    run = Run.open(run)
    options["config"] = options.get("config") or run.folder / "run.toml"
    config = configure("evaluate", options, kinds=("backbone", "metric"))
    for note in config.notes:
        progress.note(note)
    return evaluate_run(
        run,
        config,
        evaluation_folder(run, checkpoint, out),
        checkpoint=checkpoint,
        command=command or text.command("evaluate", run.folder),
        progress=progress,
    )


def evaluation_folder(
    run: Run, checkpoint: int | None = None, out: Path | str | None = None
) -> Path:
    """Where the evaluation of a checkpoint is written."""
    if out is not None:
        return Path(out)
    return run.folder / ("evaluation" if checkpoint is None else f"evaluation-{checkpoint}")


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
    prompts = tuple(row.text for row in rows)
    negatives = tuple(row.negative_prompt for row in rows)
    trained = tuple(sorted({*run.prompts} & {*prompts}))
    reports, toml, versions = run.reports, run.toml, run.versions
    settings, worker = config.evaluate, launched_worker()
    if worker.number:
        progress = SILENT
    with (
        claim(
            folder,
            part=(worker.number, worker.count),
            instead="name another folder with --out",
        ),
        kept_adapter(run.folder, checkpoint) as adapter,
    ):
        model = load_model(config, pick_device(config.run.device))
        measured = measure(
            model,
            adapter,
            config.metrics,
            rows,
            settings,
            folder / VIDEOS,
            base_folder=base_folder or run.folder,
            drawn_from=[config.tables["backbone"], config.run.deterministic],
            worker=worker,
            on_progress=lambda done: progress.update("videos", done, 2 * len(rows)),
            note=progress.note,
        )
        evaluation = Evaluation(
            name=run.name,
            prompts=prompts,
            seeds=tuple(row.seed or 0 for row in rows),
            negative_prompts=negatives if any(text is not None for text in negatives) else (),
            frames=model.shape.frames,
            fps=model.shape.fps,
            metrics=measured.metrics,
            trained_prompts=trained,
            min_prompts=settings.min_prompts,
            verdict=_verdict(measured, settings.min_prompts, len(trained), progress),
            training=tuple(reports),
            training_verdict=verdict_of(reports),
            command=text.without_credentials(command),
            run_toml=toml,
            versions=versions,
            facts=_facts(config, model, adapter),
        )
        if not worker.number:
            evaluation.save(folder)
    return evaluation


def _verdict(
    measured: Measurement, min_prompts: int, trained: int, progress: Progress
) -> EvaluationVerdict:
    for metric in measured.left_out:
        if metric.error is not None:  # for the plugin's author
            progress.note("".join(traceback.format_exception(metric.error)), warning=True)
    verdict = judge_evaluation(measured.metrics, min_prompts=min_prompts, trained_on=trained)
    reasons = [metric.reason for metric in measured.left_out]
    return verdict.model_copy(update={"details": (*verdict.details, *reasons)})


def _facts(config: Config, model: VideoModel, adapter: Path) -> dict[str, str]:
    facts = {"Checkpoint": adapter.parent.name, "Device": str(model.device)}
    if config.memory.quantization != "native":
        facts["Base quantized to"] = config.memory.quantization
    return facts
