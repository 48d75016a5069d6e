"""Build preference pairs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from dpo_video.data.audit_checks import cut_prompts
from dpo_video.data.build import Worker, wanted
from dpo_video.data.build import build as build_engine
from dpo_video.data.store import PairStore
from dpo_video.errors import UserError
from dpo_video.strategies import PairBuilder, VideoModel
from dpo_video.text import command
from dpo_video.types import Remark
from dpo_video.workflows.config import Config
from dpo_video.workflows.options import BuildOptions, configure, with_options
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.session import (
    builder_labeler,
    check_pairs,
    load_model,
    open_source,
    open_store,
    pick_device,
)

PAIRS = Path("runs/pairs")
REMARKS_SHOWN = 3  # files by name
SKIPPED_SHOWN = 20  # by name; the rest are counted


@with_options
def build_pairs(
    pairs: PairBuilder | str | None = None,
    *,
    out: Path | str | None = None,
    worker: str | None = None,
    progress: Progress = SILENT,
    **options: Unpack[BuildOptions],
) -> PairStore:
    """Build preference pairs, or the missing ones of an interrupted build.

    Args:
        pairs: The pair builder or its name; "local" by default.
        out: The folder of the pairs. By default a folder under runs/pairs, named after a hash of
            everything that the pairs depend on: equal options find the same pairs again.
        worker: "K/N" to build the Kth of N parts of the pairs. A launcher sets it by itself.
        progress: Receives the progress.
        options: See `BuildOptions`.

    Raises:
        UserError: for options that do not fit together, and for a pair that is not finite.
    """
    config = configure("build", options, pairs)
    if config.pairs is None:
        raise UserError(
            f"'{config.pair_store}' holds pairs already. Name a strategy to build others."
        )
    part = _worker(worker)
    if part.number and worker is None:  # started by a launcher: one process reports
        progress = SILENT
    for note in config.notes:
        progress.note(note)
    builder_labeler(config)
    model = load_model(config, pick_device(config.run.device))
    folder = PAIRS if out is None else Path(out)
    return obtain_pairs(
        config, model, folder, exact=out is not None, worker=part, progress=progress
    )


def obtain_pairs(
    config: Config,
    model: VideoModel,
    folder: Path,
    *,
    exact: bool = False,
    worker: Worker | None = None,
    progress: Progress = SILENT,
) -> PairStore:
    """Open the pairs that a configuration names, or build what is missing of them.

    `folder` is the pairs' folder if `exact`, else its parent. A worker builds its part only.
    """
    if config.pairs is None:
        assert config.pair_store is not None
        store = PairStore(config.pair_store)
        check_pairs(config, store, model)
        progress.note(f"Using the {len(store)} pairs in {store.where}.")
        return store
    source = open_source(config, model)
    store = open_store(config, config.pairs, model, source.fingerprint, folder, exact)
    present, total = store.made, wanted(config.build, source.count)
    if len(store) >= total:
        progress.note(f"Using {present} pairs built earlier: {store.folder}")
        return store
    before = f"{present} of them exist already, " if present else ""
    progress.note(f"Building {total} pairs ({before}in {store.folder})")
    if source.contents:
        progress.note(f"Reading {source.contents}.")
    progress.update("pairs", present, total)
    made = undecided = 0
    prompts: set[str] = set()
    for report in build_engine(
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
        prompts.add(report.prompt)
        progress.update("pairs", report.done, total)
    for skipped in source.skipped[:SKIPPED_SHOWN]:
        progress.note(f"Skipped {skipped.name}: {skipped.reason}", warning=True)
    if source.skipped:
        progress.note(f"Files skipped in total: {len(source.skipped)}")
    for line in _summarized(source.remarks):
        progress.note(line, warning=True)
    if cut := cut_prompts(prompts, model.unread):
        progress.note(cut, warning=True)
    if undecided:
        progress.note(
            f"{undecided} of {made} pairs prefer neither video, so nothing is learned from them. "
            f"Label them: {command('label', store.folder, '--labeler', 'NAME')}"
        )
    if worker is not None and worker.count > 1 and (waiting := store.made - len(store)):
        progress.note(
            f"{store.made} pairs are made; {waiting} of them wait for earlier ones, which other "
            "workers make. If a worker has stopped, run its command again."
        )
    return store


def _summarized(remarks: Sequence[Remark]) -> list[str]:
    """One sentence for all files of which a remark is true, with a few of them by name."""
    groups: dict[str, list[Remark]] = {}
    for remark in remarks:
        groups.setdefault(remark.what, []).append(remark)
    lines = []
    for what, group in groups.items():
        shown = [f"{r.name} ({r.detail})" if r.detail else r.name for r in group[:REMARKS_SHOWN]]
        more = f" and {len(group) - len(shown)} more" if len(group) > len(shown) else ""
        lines.append(f"{what}: {', '.join(shown)}{more}.")
    return lines


def _worker(given: str | None) -> Worker:
    """This process's part of a build: of `given`, or of the launcher's RANK and WORLD_SIZE."""
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
            "--worker is for builds that are started one by one; a launcher divides the work "
            "itself. Leave --worker out."
        )
    return Worker(number=int(number) - 1, count=int(count))
