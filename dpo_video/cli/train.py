"""`dpo-video train`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpo_video.cli.build import obtain_pairs, progress_bar
from dpo_video.cli.estimate import choose_blocks, warn_if_too_large
from dpo_video.cli.options import (
    Assignments,
    Backbone,
    Clips,
    Count,
    Deterministic,
    Device,
    File,
    Labeler,
    Loss,
    Metrics,
    Pairs,
    Prompt,
    Reference,
    Seed,
    Tier,
    console,
    resolve,
)
from dpo_video.errors import RunError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from rich.progress import Progress, TaskID

    from dpo_video.data.store import PairStore
    from dpo_video.strategies import VideoModel
    from dpo_video.training.diagnosis import StepReport, TrainingVerdict
    from dpo_video.training.reference_cache import ReferenceCacheReport
    from dpo_video.workflows.config import Config


def train(
    pairs: Pairs = None,
    loss: Loss = None,
    reference: Reference = None,
    backbone: Backbone = None,
    labeler: Labeler = None,
    metric: Metrics = None,
    assignments: Assignments = None,
    file: File = None,
    clips: Clips = None,
    prompt: Prompt = None,
    seed: Seed = None,
    device: Device = None,
    deterministic: Deterministic = None,
    tier: Tier = None,
    count: Count = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps.", rich_help_panel="Run")
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels", help="Labels to train on; repeat for a vote.", rich_help_panel="Run"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The run's folder; runs/PAIRS-LOSS if left out.", rich_help_panel="Run"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel="Run")
    ] = False,
    auto_resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume",
            help="Go on with the run in --out if there is one, else start it.",
            rich_help_panel="Run",
        ),
    ] = False,
) -> None:
    """Build pairs if need be, and train an adapter on them.

    Repeat a run with --config runs/NAME/run.toml; go on with one by --out runs/NAME --resume. One
    command for machines that may be taken away, and for launchers that restart: --auto-resume.
    """  # fmt: skip
    if (resume or auto_resume) and out is None:
        raise UserError("Which run goes on? Name it: dpo-video train --out runs/NAME --resume")
    begun = out is not None and (out / "run.toml").is_file()
    if resume and not begun:
        raise RunError(f"'{out}' is not a run: it has no run.toml. Start it without --resume.")
    if begun and not (resume or auto_resume):
        raise RunError(
            f"'{out}' holds a run already. Go on with it by --resume, or name another --out."
        )
    resume = False
    if out is not None and begun:
        file = file or out / "run.toml"
        # Stopped before its first checkpoint, it has nothing to lose by beginning again.
        resume = (out / "checkpoints" / "latest").exists()
    config = resolve(
        file,
        assignments,
        tier=tier,
        pairs=pairs,
        loss=loss,
        reference=reference,
        backbone=backbone,
        labeler=labeler,
        metrics=metric,
        run_clips=clips,
        run_prompt=prompt,
        run_seed=seed,
        run_device=device,
        run_deterministic=deterministic,
        build_count=count,
        train_steps=steps,
        train_labels=labels or None,
    )
    folder = out or _free_folder(config)

    from dpo_video.data.build import Worker
    from dpo_video.memory.compile import check_compile
    from dpo_video.training.step import check_backward
    from dpo_video.workflows.session import (
        accelerator_for,
        apply_labels,
        as_launched,
        builder_labeler,
        load_model,
    )

    check_backward(config.loss, config.memory)
    builder_labeler(config)
    asked, config = config.memory, as_launched(config)
    accelerator: Accelerator = accelerator_for(config, folder)
    console.quiet = not accelerator.is_main_process
    if config.memory != asked:
        console.print(
            f"As the launcher asks for: memory.shard={config.memory.shard}, "
            f"memory.offload={','.join(config.memory.offload) or 'none'}.",
            highlight=False,
        )
    check_compile(config.memory, accelerator.device)
    if config.memory.checkpointing == "auto":
        config = choose_blocks(config, tier=tier, device=accelerator.device)
    elif accelerator.is_main_process:
        warn_if_too_large(config, accelerator.device)
    model = load_model(config, accelerator.device)
    sharing = Worker(number=accelerator.process_index, count=accelerator.num_processes)
    store = obtain_pairs(config, model, folder.parent / "pairs", worker=sharing)
    accelerator.wait_for_everyone()
    store.refresh()  # what the others have built
    labelled = apply_labels(config, store)
    config, store = labelled.config, labelled.store
    if config.train.labels:
        console.print(
            f"{labelled.pairs} of {len(store)} pairs have labels ({', '.join(config.train.labels)})"
            + ("; the others are left out." if labelled.pairs < len(store) else ".")
        )
    write_run(config, folder, accelerator)
    run_training(config, model, store, folder, accelerator, resume=resume)


def _free_folder(config: Config) -> Path:
    """runs/PAIRS-LOSS, or the first of runs/PAIRS-LOSS-2, -3, ... that is free."""
    named = config.pairs if isinstance(config.pairs, str) else config.tables["pairs"]["name"]
    pairs = Path(named).name
    name = f"{pairs}-{config.tables['loss']['name']}"
    folder, number = Path("runs") / name, 1
    while (folder / "run.toml").exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def write_run(config: Config, folder: Path, accelerator: Accelerator) -> None:
    """Write the run's run.toml."""
    from dpo_video.support.atomic import write_text, writing

    if accelerator.is_main_process:
        with writing(folder):
            write_text(folder / "run.toml", config.toml())


def run_training(
    config: Config,
    model: VideoModel,
    store: PairStore,
    folder: Path,
    accelerator: Accelerator,
    *,
    resume: bool,
) -> None:
    """Train, show what happens, and end with the verdict."""
    from dpo_video.cli.stopping import go_on_with, later
    from dpo_video.training.diagnosis import TrainingState, judge_training
    from dpo_video.training.loop import train as train_loop

    tables, settings = config.tables, config.train
    slope = getattr(config.loss, "beta", None)
    per_step = (
        settings.batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    )
    console.print(
        f"[bold]{tables['loss']['name']}[/] loss"
        + (f" (slope beta = {slope:g} on the mean-squared-error margin)" if slope else "")
        + f", [bold]{tables['reference']['name']}[/] reference, {settings.steps} steps of "
        f"{per_step} pairs, LoRA rank {settings.rank}, lr {settings.learning_rate:g}, "
        f"on {accelerator.device}. Run: [bold]{folder}[/]"
    )
    if config.memory.quantization != "native":
        console.print(
            f"[yellow]The base is packed in {config.memory.quantization}[/]: policy and "
            "reference are "
            "another model than the published one, and what is learned is measured on it."
        )
    if config.memory.compile == "on":
        console.print("The first step compiles the blocks, which may take minutes.")
    _say_what_is_left_out(store)
    reports: list[StepReport] = []
    verdict: TrainingVerdict | None = None
    bar = progress_bar()
    task = bar.add_task("steps", total=settings.steps)
    with (
        later() as stopping,
        Live(console=console, refresh_per_second=4, transient=True) as live,
    ):
        for progress in train_loop(
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
            on_reference_cache=_bank_shown(
                live,
                bar,
                settings.steps * settings.gradient_accumulation_steps * settings.batch_size,
            ),
            stop=stopping.is_set,
        ):
            report = progress.report
            reports.append(report)
            accelerator.log(report.model_dump(exclude={"step"}), step=report.step)
            bar.update(task, completed=report.step)
            live.update(Group(_figures(report), bar))
            if report.skipped:
                live.console.print(
                    f"[yellow]Skipped[/] step {report.step}: its loss is {report.loss:.4g}, its "
                    f"gradient {report.grad_norm:.4g}; pairs {', '.join(progress.unsound)}. "
                    f"Up to {settings.skips} of a run may be skipped (train.skips).",
                    highlight=False,
                )
            if progress.checkpoint is not None:
                live.console.print(
                    f"step {report.step:>5}  loss {report.loss:.4f}  margin {report.margin:+.2e}  "
                    f"accuracy {report.accuracy:.0%}  saved {progress.checkpoint}",
                    highlight=False,
                )
            judged = judge_training(reports, slope=slope_of(reports), steps=settings.steps)
            before = verdict.state if verdict else TrainingState.TOO_EARLY
            if judged.state is not before:
                live.console.print(_sentence(judged))
            verdict = judged
    accelerator.end_training()
    if stopping.is_set() and (not reports or reports[-1].step < settings.steps):
        made = f"Stopped and saved at step {reports[-1].step}." if reports else "Stopped."
        go_on_with(f"dpo-video train --out {folder} --resume", made)
    if verdict is None:
        console.print(f"'{folder}' has all its {settings.steps} steps already. "
                      "Give more with --steps.")  # fmt: skip
    else:
        console.print(_sentence(verdict))
    console.print(f"Compare it with the base: [bold]dpo-video evaluate {folder}[/]")


def _say_what_is_left_out(store: PairStore) -> None:
    decided = store.decided()
    if left := len(store) - len(decided):
        console.print(f"{left} of {len(store)} pairs are left out: they prefer neither video "
                      "in any frame.")  # fmt: skip
    if even := sum(not store.preference(index).sum() for index in decided):
        console.print(f"{even} of {len(store)} pairs are even, with as many frames for one video "
                      "as for the other: only a loss that looks at frames (segment) learns from "
                      "them.")  # fmt: skip


def _bank_shown(live: Live, bar: Progress, visits: int) -> Callable[[ReferenceCacheReport], None]:
    """Shows a bank of predictions being filled; its size and time before it starts."""
    task: TaskID | None = None

    def show(report: ReferenceCacheReport) -> None:
        nonlocal task
        if task is None:
            uses = visits / report.total
            live.console.print(
                f"Bank of {report.total} predictions ({report.size / 1e6:,.1f} MB, each used "
                f"{uses:.1f} times) in [bold]{report.folder}[/]: "
                + (
                    f"{report.total - report.done} to make, about {report.seconds:,.0f} s."
                    if report.done < report.total
                    else "all there."
                ),
                highlight=False,
            )
            if report.done == 0 and uses < 2:
                live.console.print(
                    "[yellow]Used so little, the bank saves this run nothing[/]; another run on "
                    "these pairs will find it. Alone, --reference toggle is as fast."
                )
            task = bar.add_task("bank", total=report.total)
        bar.update(task, completed=report.done, visible=report.done < report.total)
        live.update(bar)

    return show


def slope_of(reports: list[StepReport]) -> float:
    """The loss's slope, read off its logits and margins: any loss has one, named or not."""
    finite = [report for report in reports if math.isfinite(report.margin)]
    margins = sum(abs(report.margin) for report in finite)
    return sum(abs(report.logits) for report in finite) / margins if margins else 1.0


def _sentence(verdict: TrainingVerdict) -> Text:
    styles = {"healthy": "bold green", "too_early": "dim", "diverged": "bold red"}
    style = styles.get(verdict.state.value, "bold yellow")
    head = verdict.state.value.replace("_", " ")
    return Text.assemble(
        (f"{head} (step {verdict.step})", style), f"  {verdict.seen} {verdict.change}"
    )


def _figures(report: StepReport) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    figures = {
        "loss": f"{report.loss:.4f}",
        "margin": f"{report.margin:+.2e}",
        "accuracy": f"{report.accuracy:.0%}",
        "winner error": f"{report.chosen_change:+.2e}",
        "loser error": f"{report.rejected_change:+.2e}",
        "gradient factor": f"{report.gradient_factor:.3f}",
        "pairs/s": f"{report.pairs_per_second:.2f}",
        "GiB": f"{report.memory_gib:.2f}",
    }
    for name in figures:
        table.add_column(name, justify="right", min_width=8)
    table.add_row(*figures.values())
    return table
