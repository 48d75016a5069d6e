"""`dpo-video build`."""

from __future__ import annotations

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
    from dpo_video.config import Config
    from dpo_video.store import PairStore
    from dpo_video.strategies import VideoModel

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
) -> None:
    """Build preference pairs and stop. An interrupted build goes on where it was."""
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
    if isinstance(config.pairs, Path):
        raise UserError(f"'{config.pairs}' holds pairs already. Name a strategy to build others.")
    from dpo_video.session import check_labeler, load_model, pick_device

    check_labeler(config)
    model = load_model(config, pick_device(config.run.device))
    store = obtain_pairs(config, model, out or Path("runs/pairs"), exact=out is not None)
    console.print(f"{len(store)} pairs in [bold]{store.folder}[/]. "
                  f"Train on them: dpo-video train --pairs {store.folder}/")  # fmt: skip


def obtain_pairs(config: Config, model: VideoModel, where: Path, exact: bool = False) -> PairStore:
    """Open the pairs that the configuration names, or build what is missing of them."""
    from dpo_video.build import build as build_pairs
    from dpo_video.build import wanted
    from dpo_video.session import open_source, open_store
    from dpo_video.store import PairStore

    if isinstance(config.pairs, Path):
        store = PairStore(config.pairs)
        store.check_fits(model)
        console.print(f"Using the {len(store)} pairs in [bold]{store.folder}[/].")
        return store
    source = open_source(config, model)
    store = open_store(config, config.pairs, model, source.fingerprint, where, exact)
    present, total = len(store), wanted(config.build, source.count)
    if present >= total:
        console.print(f"Using {present} pairs built earlier: [bold]{store.folder}[/]")
        return store
    again = f"{present} are there already, " if present else ""
    console.print(f"Building {total} pairs ({again}in [bold]{store.folder}[/])")
    undecided = 0
    with progress_bar() as bar:
        task = bar.add_task("pairs", total=total, completed=present)
        for report in build_pairs(
            store,
            source.clips,
            config.pairs,
            model,
            config.build,
            seed=config.run.seed,
            labeler=config.labeler,
            available=source.count,
        ):
            undecided += not report.decided
            bar.update(task, completed=report.done)
    for skipped in source.skipped[:SKIPPED_SHOWN]:
        console.print(f"[yellow]Skipped[/] {escape(skipped.name)}: {escape(skipped.reason)}")
    if source.skipped:
        console.print(f"Files skipped in all: {len(source.skipped)}")
    if undecided:
        console.print(
            f"{undecided} of {len(store) - present} pairs prefer neither video, and train nothing. "
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
