"""`dpo-video evaluate`."""

from __future__ import annotations

import tomllib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from dpo_video.cli.build import progress_bar
from dpo_video.cli.options import (
    Assignments,
    Checkpoint,
    Deterministic,
    Device,
    Json,
    Metrics,
    console,
    resolve,
    typed,
)
from dpo_video.cli.train import slope_of
from dpo_video.errors import RunError

if TYPE_CHECKING:
    from dpo_video.evaluation.results import Evaluation
    from dpo_video.types import Videos
    from dpo_video.workflows.config import Config


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=2, help="Videos of base and tuned each.")
    ] = None,
    metric: Metrics = None,
    assignments: Assignments = None,
    device: Device = None,
    deterministic: Deterministic = None,
    checkpoint: Checkpoint = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="RUN/evaluation if left out; RUN/evaluation-STEP of a STEP."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a run's tuned model with its base on identical prompts and seeds.

    Writes evaluation.json, both sets of videos and one self-contained page, index.html.
    """  # fmt: skip
    if not (run / "run.toml").is_file():
        raise RunError(f"'{run}' is not a run: it has no run.toml. Name a folder under runs/.")
    config = resolve(
        run / "run.toml",
        assignments,
        metrics=metric,
        run_device=device,
        run_deterministic=deterministic,
        evaluate_seeds=seeds,
    )
    folder = out or run / ("evaluation" if checkpoint is None else f"evaluation-{checkpoint}")
    evaluation = evaluate_run(run, config, folder, checkpoint=checkpoint, command=typed())
    if as_json:
        typer.echo(evaluation.to_json())
        return
    Console().print(evaluation.table())
    for detail in evaluation.verdict.details:
        console.print(f"[dim]-[/] {escape(detail)}", highlight=False)
    console.print(f"\nLook at it: [bold]{folder / 'index.html'}[/]")


def evaluate_run(
    run: Path,
    config: Config,
    folder: Path,
    *,
    command: str,
    checkpoint: int | None = None,
    base: Videos | None = None,
) -> Evaluation:
    """Measure a run and write its evaluation.

    Args:
        run: Its folder.
        config: How it is evaluated.
        folder: Where that goes.
        command: What repeats it.
        checkpoint: The step of the run that is measured; None for the last checkpoint.
        base: The base's videos, if they are drawn already.
    """
    from dpo_video.data.video import video_bytes
    from dpo_video.evaluation.evaluate import measure
    from dpo_video.evaluation.results import Evaluation
    from dpo_video.evaluation.verdict import judge_evaluation
    from dpo_video.training.diagnosis import judge_training
    from dpo_video.training.run_dir import checkpoint_at, read_log
    from dpo_video.workflows.session import load_model, pick_device

    adapter = checkpoint_at(run, checkpoint) / "adapter"
    model = load_model(config, pick_device(config.run.device))
    settings = config.evaluate
    prompts = config.backbone.prompts(settings.seeds)
    with progress_bar() as bar:
        task = bar.add_task("videos", total=2 * len(prompts))
        measured = measure(
            model,
            adapter,
            config.metrics,
            prompts,
            settings,
            base=base,
            on_progress=lambda done: bar.update(task, completed=done),
        )
    for metric in measured.left_out:
        if metric.error is not None:  # for the plugin's author
            traceback.print_exception(metric.error)
    reports = read_log(run)
    left_out = [metric.reason for metric in measured.left_out]
    verdict = judge_evaluation(measured.metrics, tolerance=settings.tolerance)
    text = (run / "run.toml").read_text(encoding="utf-8")
    evaluation = Evaluation(
        name=run.resolve().name,
        prompts=tuple(prompts),
        seeds=tuple(range(settings.seed, settings.seed + len(prompts))),
        frames=model.shape.frames,
        fps=model.shape.fps,
        metrics=measured.metrics,
        tolerance=settings.tolerance,
        verdict=verdict.model_copy(update={"details": (*verdict.details, *left_out)}),
        training=tuple(reports),
        training_verdict=judge_training(reports, slope=slope_of(reports)) if reports else None,
        command=command,
        run_toml=text,
        versions=tomllib.loads(text).get("versions", {}),
        facts={
            "Checkpoint": adapter.parent.name,
            "Device": str(model.device),
            **(
                {}
                if config.memory.quantization == "native"
                else {"Base packed in": config.memory.quantization}
            ),
        },
    )
    videos = [
        (video_bytes(first, model.shape.fps), video_bytes(second, model.shape.fps))
        for first, second in zip(measured.base, measured.tuned, strict=True)
    ]
    evaluation.save(folder, videos)
    return evaluation
