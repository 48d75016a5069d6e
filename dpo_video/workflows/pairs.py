"""Audit, pack and export finished pairs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Unpack

from dpo_video.data.audit import Audit, audit
from dpo_video.data.encodings import PromptEncodings
from dpo_video.data.pack import pack as pack_pairs
from dpo_video.data.store import PairStore
from dpo_video.data.videodpo import VideoDPOExport, export_videodpo
from dpo_video.errors import StoreError, UserError
from dpo_video.extensions import PairCheck
from dpo_video.registry import local
from dpo_video.strategies import Metric, VideoModel
from dpo_video.support.urls import is_url
from dpo_video.text import command, label_command
from dpo_video.workflows.config import Config
from dpo_video.workflows.options import Options, checked, configure, with_options
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.session import apply_labels, evaluation_prompts, load_model, pick_device
from dpo_video.workflows.tables import table_of


def opened(pairs: PairStore | Path | str) -> PairStore:
    """A pair set by its folder or URL."""
    return pairs if isinstance(pairs, PairStore) else PairStore(pairs)


def prompt_encodings(
    model: VideoModel, config: Config, store: PairStore | None = None
) -> PromptEncodings:
    """Encodes prompts, with what is stored in `store` or else in the configuration's pairs."""
    if store is None and config.pair_store is not None and not is_url(config.pair_store):
        with suppress(StoreError):  # deleted since
            store = PairStore(config.pair_store)
    negative = config.tables["backbone"].get("negative_prompt", "")
    return PromptEncodings(model, store, negative)


def next_step(store: PairStore, *options: str) -> str:
    """What to do with finished pairs: train on them with a loss that suits them, or label them."""
    backbone = table_of(store.manifest.recipe, "backbone").get("name")
    code = ("--allow-code",) if local.is_file(str(backbone)) else ()
    if not (options or store.decided()):
        label = " ".join([label_command(store.folder), *code])
        return f"Label them, then train with --labels: {label}"
    where = f"{store.folder}/" if store.local else store.where
    suited = "group" if store.has_groups and "--labels" not in options else "global"
    loss = () if store.has_regions else ("--loss", suited)
    return f"Train on them: {command('train', '--pairs', where, *loss, *options, *code)}"


@with_options
@checked
def check(
    pairs: PairStore | Path | str,
    *,
    labels: Sequence[str] | None = None,
    sample: int = 32,
    prompts: Path | str | None = None,
    metrics: Sequence[Metric | str] | None = None,
    checks: Sequence[PairCheck | str] | None = None,
    progress: Progress = SILENT,
    **options: Unpack[Options],
) -> Audit:
    """Audit a pair set before training on it.

    Args:
        pairs: The pairs, or their folder or URL. They are audited for the backbone that they were
            made with, unless `backbone` or `config` is given.
        labels: Labels to audit instead of the pairs' own.
        sample: Number of pairs to decode, to compare the motion of both videos.
        prompts: File of evaluation prompts, to find those that are trained on; the backbone's
            own by default.
        metrics: Those with the role "motion" are compared.
        checks: Checks, by default all built-in ones; names like `+NAME` are added to those.
        progress: Receives the progress.
        options: See `Options`.
    """
    store = opened(pairs)
    flags = {} if prompts is None else {"evaluate.prompts": str(prompts)}
    given = {**options, "labels": labels, "metrics": metrics}
    kinds = ("backbone", "metric", "check")
    config = configure("train", given, store, flags, kinds, checks=checks or ())
    model = load_model(config, pick_device(config.run.device))
    store = apply_labels(config, store).store
    return audit(
        store,
        model,
        config.metrics,
        [prompt.text for prompt in evaluation_prompts(config, progress.note)],
        checks=list(config.checks.values()),
        sample=sample,
        on_progress=lambda done: progress.update("pairs", done, len(store)),
    )


@checked
def pack(
    pairs: PairStore | Path | str,
    out: Path | str,
    *,
    shard_mib: int = 256,
    progress: Progress = SILENT,
) -> PairStore:
    """Copy pairs into a few large files, to move them or to stream them from a bucket.

    Args:
        pairs: The pairs, or their folder or URL.
        out: The folder of the packed copy.
        shard_mib: Size of a file, MiB.
        progress: Receives the progress.
    """
    store = opened(pairs)
    if not len(store):
        raise UserError(f"'{store.where}' holds no pairs yet. Build some first: dpo-video build")
    for report in pack_pairs(store, Path(out), shard_mib << 20):
        progress.update("pairs and prompts", report.done, report.total)
    return PairStore(out)


@checked
def export_pairs(
    pairs: PairStore | Path | str, out: Path | str, *, labels: Sequence[str] | None = None
) -> VideoDPOExport:
    """Write pairs as the pair_00000.pt files that Video-DPO publishes, with their prompts.

    The format has a chosen and a rejected video only: ties are left out, labels that differ between
    frames become their majority, and regions and the samples between of groups are lost. The result
    counts them.

    Args:
        pairs: The pairs, or their folder or URL.
        out: The folder of the files.
        labels: Labels to use instead of the pairs' own; a vote if there are several.
    """
    config = configure("train", {"labels": labels}, kinds=("backbone",))
    return export_videodpo(apply_labels(config, opened(pairs)).store, Path(out))
