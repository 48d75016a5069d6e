"""Build preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from dpo_video import registry
from dpo_video.data.audit_checks import cut_prompts
from dpo_video.data.build import Worker, wanted
from dpo_video.data.build import build as build_engine
from dpo_video.data.store import Manifest, PairStore
from dpo_video.errors import RunError, UserError
from dpo_video.registry import local
from dpo_video.settings import BuildSettings
from dpo_video.strategies import PairBuilder, VideoModel
from dpo_video.support.claims import claim
from dpo_video.support.formatting import counted
from dpo_video.text import command, label_command
from dpo_video.training.checkpoint import Checkpoint
from dpo_video.types import Remark
from dpo_video.workflows import pair_versions
from dpo_video.workflows.config import Config
from dpo_video.workflows.distributed import launched_worker
from dpo_video.workflows.launcher import hidden, launcher_request, notes_on
from dpo_video.workflows.options import BuildOptions, checked, configure, with_options
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.session import (
    OpenedSource,
    builder_labeler,
    check_pairs,
    load_model,
    open_source,
    pick_device,
    store_manifest,
)

PAIRS = Path("runs/pairs")
REMARKS_SHOWN = 3  # files by name
SKIPPED_SHOWN = 20  # by name; the rest are counted


@with_options
@checked
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
        BusyError: if another process is building these pairs.
    """
    request = launcher_request()
    if request.shard > 1:
        raise UserError(
            "Each process of a build holds a complete model, and the launcher asks for FSDP or "
            "ZeRO-3. Launch it without (accelerate launch --multi_gpu); memory.offload=blocks "
            "keeps the weights in CPU memory."
        )
    config = configure("build", options, pairs, launched=request.options)
    if config.pairs is None:
        raise UserError(
            f"'{config.pair_store}' holds pairs already. Name a strategy to build others."
        )
    part = _worker(worker)
    if part.number and worker is None:  # started by a launcher: one process reports
        progress = SILENT
    for note in (*config.notes, *notes_on(config, request, memory=False)):
        progress.note(note)
    builder_labeler(config)
    folder = PAIRS if out is None else Path(out)
    with hidden():
        model = load_model(config, pick_device(config.run.device))
        return obtain_pairs(
            config, model, folder, exact=out is not None, worker=part, progress=progress
        )


def obtain_pairs(
    config: Config,
    model: VideoModel,
    folder: Path,
    *,
    exact: bool = False,
    wait: bool = False,
    worker: Worker = Worker(),  # noqa: B008 - it is frozen
    progress: Progress = SILENT,
    resumed: Checkpoint | None = None,
) -> PairStore:
    """Open the pairs that a configuration names, or build what is missing of them.

    Args:
        config: The configuration.
        model: The model that builds them.
        folder: The pairs' folder if `exact`, else its parent.
        exact: Otherwise the pairs' folder is named after a hash of everything that the pairs depend
            on but versions, so that equal recipes share their pairs.
        wait: Whether to wait for another process that is building these pairs.
        worker: The part of the pairs to build.
        progress: Receives the progress.
        resumed: The checkpoint of a run whose pairs these must be.

    Raises:
        BusyError: if another process is building these pairs.
        RunError: if a resumed run was trained on other pairs.
        StoreError: if another version has built them, and `config` does not say what to do.
    """
    if config.pairs is None:
        assert config.pair_store is not None
        store = PairStore(config.pair_store)
        check_pairs(config, store, model)
        progress.note(f"Using the {counted(len(store), 'pair')} in {store.where}.")
        if after := store.made - len(store):
            progress.note(
                f"{counted(after, 'pair')} after the missing pair {len(store)} are not used. "
                "Continue the command that built them to fill the gap.",
                warning=True,
            )
        unused = {
            "--clips": config.run.clips,
            "--prompt": config.run.prompt,
            "--prompts": config.build.prompts,
            "--count": config.build.count,
        }
        if given := [flag for flag, value in unused.items() if value is not None]:
            progress.note(f"Not used, because the pairs exist: {', '.join(given)}.", warning=True)
        return store
    source = open_source(config, model, progress.note)
    manifest = store_manifest(config, model, source.fingerprint)
    settings, total = config.build, wanted(config.build, source.count)
    if resumed is not None:
        total = resumed.manifest.fingerprint.count
        settings = settings.model_copy(update={"count": total})
    if not exact:
        names = "-".join(
            registry.short_name(config.tables[kind]["name"]) for kind in ("pairs", "backbone")
        )
        folder /= f"{names}-{manifest.recipe_key}"
    chosen = pair_versions.choose(
        folder,
        manifest,
        settings,
        total,
        exact=exact,
        several=worker.count > 1,
        trained_on=resumed.manifest.fingerprint.recipe if resumed is not None else "",
        note=progress.note,
    )
    if isinstance(chosen, PairStore):
        return chosen
    folder = chosen
    if resumed is not None:
        _check_recipe(config, manifest, resumed)
    if (folder / "store.json").exists():
        store = PairStore(folder)
        finished = store.manifest.key == manifest.key and len(store) >= total
        if finished and store.is_complete():
            progress.note(f"Using {counted(store.made, 'pair')} built earlier: {store.folder}")
            return store
    with claim(
        folder,
        part=(worker.number, worker.count),
        instead="name another folder with --out",
        patience=float("inf") if wait else 0.0,
        note=progress.note,
    ):
        store = PairStore.create(folder, manifest)
        local.save(manifest.recipe, folder)
        if missing := store.forget_missing():
            progress.note(f"Files of {missing} pairs are missing; they are built again.")
        later = exact or bool(config.train.labels)
        return _build(config, store, source, model, settings, total, worker, progress, later)


def _check_recipe(config: Config, manifest: Manifest, resumed: Checkpoint) -> None:
    """Refuse other pairs than a run's before they are built."""
    if manifest.key == resumed.manifest.fingerprint.recipe:
        return
    clips = f", or the files in '{config.run.clips}'" if config.run.clips else ""
    raise RunError(
        f"Cannot resume from '{resumed.folder}': the reference or the pairs have changed. What has "
        f"changed: how the pairs are built (the options of the backbone, of the pairs or their "
        f"labeler{clips}). Restore it, or start a new run with another --out."
    )


def _refuse_unlabelled(config: Config, store: PairStore) -> None:
    kind = config.tables["pairs"]["name"]
    raise UserError(
        f"The first pair of kind '{kind}' prefers neither video, so nothing can be learned until "
        "the pairs are labelled. Let a metric label them (--labeler metric), or build, label and "
        f"train in turn: {command('build', '--pairs', kind, '--out', 'PAIRS')}, then "
        f"{label_command('PAIRS')}, then "
        f"{command('train', '--pairs', 'PAIRS/', '--labels', 'metric')}. The pair is kept in "
        f"'{store.folder}'."
    )


def _build(
    config: Config,
    store: PairStore,
    source: OpenedSource,
    model: VideoModel,
    settings: BuildSettings,
    total: int,
    worker: Worker,
    progress: Progress,
    labelled_later: bool,
) -> PairStore:
    assert config.pairs is not None
    present = store.made
    before = f"{present} of them exist already, " if present else ""
    progress.note(f"Building {counted(total, 'pair')} ({before}in {store.folder})")
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
        settings,
        seed=config.run.seed,
        labeler=builder_labeler(config),
        available=source.count,
        worker=worker,
    ):
        made += 1
        undecided += not report.decided
        unlabelled = config.pairs.asks_labeler and config.labeler is None
        if made == undecided and unlabelled and not labelled_later:
            _refuse_unlabelled(config, store)
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
            f"Label them, by metrics or by another labeler: {label_command(store.folder)}"
        )
    if worker.count > 1 and (waiting := store.made - len(store)):
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
    launched = launched_worker()
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
