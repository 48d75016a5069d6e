"""`dpo-video build`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dpo_video.cli.options import (
    Assignments,
    Backbone,
    Clips,
    Count,
    Deterministic,
    Device,
    File,
    Labeler,
    Pairs,
    Prompt,
    Seed,
    Tier,
    console,
    resolve,
)
from dpo_video.errors import UserError

if TYPE_CHECKING:
    from dpo_video.data.build import Worker
    from dpo_video.data.store import PairStore
    from dpo_video.strategies import VideoModel
    from dpo_video.workflows.config import Config

SKIPPED_SHOWN = 20  # by name; the rest are counted


def build(
    pairs: Pairs = None,
    backbone: Backbone = None,
    labeler: Labeler = None,
    assignments: Assignments = None,
    file: File = None,
    clips: Clips = None,
    prompt: Prompt = None,
    seed: Seed = None,
    device: Device = None,
    deterministic: Deterministic = None,
    tier: Tier = None,
    count: Count = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder to write, or to go on with.")
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option("--worker", metavar="K/N", help="Make a part: 1/8 to 8/8 share one folder."),
    ] = None,
) -> None:
    """Build preference pairs and stop. An interrupted build goes on where it was.

    Several workers may share a folder, on one machine or on a disk that several see: start them
    with --worker 1/8 to 8/8, or all at once by `accelerate launch`. The pairs are the same.
    """
    config = resolve(
        file,
        assignments,
        tier=tier,
        pairs=pairs,
        backbone=backbone,
        labeler=labeler,
        run_clips=clips,
        run_prompt=prompt,
        run_seed=seed,
        run_device=device,
        run_deterministic=deterministic,
        build_count=count,
    )
    if isinstance(config.pairs, str):
        raise UserError(f"'{config.pairs}' holds pairs already. Name a strategy to build others.")
    sharing = _worker(worker)
    console.quiet = sharing.number > 0 and worker is None
    from dpo_video.workflows.session import builder_labeler, load_model, pick_device

    builder_labeler(config)
    model = load_model(config, pick_device(config.run.device))
    store = obtain_pairs(
        config, model, out or Path("runs/pairs"), exact=out is not None, worker=sharing
    )
    if sharing.count > 1 and (others := store.made - len(store)):
        console.print(
            f"{store.made} pairs are made; {others} of them wait for others before them, which "
            "the other workers make. If one of them is gone, run its command again."
        )
    console.print(f"{len(store)} pairs in [bold]{store.folder}[/]. "
                  f"Train on them: dpo-video train --pairs {store.folder}/")  # fmt: skip


def _worker(given: str | None) -> Worker:
    """Which part of the build is this process's: by --worker, or by the launcher that started it.

    `accelerate launch` and `torchrun` say so by RANK and WORLD_SIZE.
    """
    from dpo_video.data.build import Worker

    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    launched = Worker()
    if rank.isdecimal() and world.isdecimal() and int(rank) < int(world):
        launched = Worker(number=int(rank), count=int(world))
    if given is None:
        return launched
    number, _, count = given.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(
            f"--worker {given} is not K/N. Give the first of eight --worker 1/8, the last 8/8."
        )
    if launched.count > 1:
        raise UserError(
            "--worker is for builds that are started one by one; a launcher shares the work by "
            "itself. Leave --worker out."
        )
    return Worker(number=int(number) - 1, count=int(count))


def obtain_pairs(
    config: Config,
    model: VideoModel,
    where: Path,
    exact: bool = False,
    worker: Worker | None = None,
) -> PairStore:
    """Open the pairs that the configuration names, or build what is missing of them.

    Of what is missing, a worker of several makes its own part alone.
    """
    from dpo_video.data.build import Worker, wanted
    from dpo_video.data.build import build as build_pairs
    from dpo_video.data.store import PairStore
    from dpo_video.workflows.session import builder_labeler, open_source, open_store

    if isinstance(config.pairs, str):
        store = PairStore(config.pairs)
        store.check_fits(model)
        console.print(f"Using the {len(store)} pairs in [bold]{store.where}[/].")
        return store
    source = open_source(config, model)
    store = open_store(config, config.pairs, model, source.fingerprint, where, exact)
    present, total = store.made, wanted(config.build, source.count)
    if len(store) >= total:
        console.print(f"Using {present} pairs built earlier: [bold]{store.folder}[/]")
        return store
    again = f"{present} are there already, " if present else ""
    console.print(f"Building {total} pairs ({again}in [bold]{store.folder}[/])")
    made = undecided = 0
    with progress_bar() as bar:
        task = bar.add_task("pairs", total=total, completed=present)
        for report in build_pairs(
            store,
            source.clips,
            config.pairs,
            model,
            config.build,
            seed=config.run.seed,
            labeler=builder_labeler(config),
            available=source.count,
            worker=worker or Worker(),
        ):
            made += 1
            undecided += not report.decided
            bar.update(task, completed=report.done)
    for skipped in source.skipped[:SKIPPED_SHOWN]:
        console.print(f"[yellow]Skipped[/] {escape(skipped.name)}: {escape(skipped.reason)}")
    if source.skipped:
        console.print(f"Files skipped in all: {len(source.skipped)}")
    if undecided:
        console.print(
            f"{undecided} of {made} pairs prefer neither video, and train nothing. "
            f"Label them: dpo-video label {store.folder} --labeler NAME"
        )
    return store


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        """The rate, once there is one."""
        return Text(f"{task.speed:.2f}/s" if task.speed else "", style="progress.data.speed")


def progress_bar() -> Progress:
    """A bar with count, rate and time left."""
    return Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
