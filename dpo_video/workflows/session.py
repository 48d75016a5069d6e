"""From a resolved configuration to loaded things: the device, the model, the clips, the pairs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs

from dpo_video.data.build import Source, cycle_prompts, in_order
from dpo_video.data.clips import open_clips
from dpo_video.data.labels import open_label_sets, preferences
from dpo_video.data.store import Manifest, PairStore
from dpo_video.errors import StoreError, UserError
from dpo_video.memory.packed_weights import check_base, frozen_weights, pack_frozen_weights
from dpo_video.memory.sharding import Shard
from dpo_video.strategies import (
    PACKED,
    Labeler,
    PairBuilder,
    StoreLabeler,
    SuppliedPairs,
    VideoModel,
)
from dpo_video.support.reproducibility import settle
from dpo_video.types import Placement, Skipped
from dpo_video.workflows import distributed
from dpo_video.workflows.config import Config, Tables
from dpo_video.workflows.distributed import launcher_request

PROMPTS = 64  # cycled, for pairs that need no clip on a backbone that has none of its own


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is the best there is."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        name = available[0]
    own = os.environ.get("LOCAL_RANK", "")  # of the processes that a launcher started here
    if name == "cuda" and own.isdecimal() and int(own) < torch.cuda.device_count():
        name = f"cuda:{own}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"'{name}' is no device. Choose among {', '.join(available)}.") from error
    if device.type not in available:
        raise UserError(
            f"There is no '{device.type}' here, or this torch cannot use it. Choose among "
            f"{', '.join(available)}."
        )
    return device


def load_model(config: Config, device: torch.device) -> VideoModel:
    """Load the backbone; its weights stay fp32 on a CPU and under mixed precision's choice."""
    settle(config.run.deterministic)
    dtypes = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    # Their progress bars come in dozens and say nothing that ours do not.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    memory, dtype = config.memory, dtypes[config.train.mixed_precision]
    on_host = "blocks" in memory.offload
    # One process alone, which looks at what several have trained, has all to itself.
    shared = memory.shard > 1 and torch.distributed.is_initialized()
    if memory.quantization == "native" and not on_host and not shared:
        return config.backbone.load(Placement(device, dtype))
    check_base(memory.quantization)
    shard = Shard.among(memory.shard) if shared else None
    pack = partial(
        pack_frozen_weights, device=device, base=memory.quantization, on_host=on_host, shard=shard
    )
    model = config.backbone.load(Placement(device, dtype, pack=pack))
    if next(frozen_weights(model.denoiser), None) is None:  # a backbone that loads in its own way
        pack(model.denoiser)
    if memory.quantization != "native":
        model.identity += f"{PACKED}{memory.quantization}"
    return model


@dataclass(frozen=True, kw_only=True)
class OpenedSource:
    """Where the clips come from."""

    clips: Source
    fingerprint: str
    """A hash or a name that stands for them."""
    count: int | None = None
    """How many there are at most; None where they have no end."""
    skipped: Sequence[Skipped] = ()
    """The user's files that give none; grows while clips are read."""


def builder_labeler(config: Config) -> Labeler | None:
    """The labeler that pairs are built with; None for pairs that are built or need none.

    Call it before anything is loaded: it raises a UserError if builder and labeler do not match.
    """
    if config.pairs is None:
        return None
    kind = config.tables["pairs"]["name"]
    if config.labeler is None and config.pairs.needs_labeler:
        raise UserError(
            f"Pairs of kind '{kind}' need somebody who ranks them. Choose with --labeler NAME (see "
            "`dpo-video list labeler`)."
        )
    if config.labeler is not None and not config.pairs.asks_labeler:
        raise UserError(
            f"Pairs of kind '{kind}' know who is better and ask no labeler. Leave --labeler out, "
            "or label them once they are built: dpo-video label PAIRS --labeler NAME"
        )
    if isinstance(config.labeler, StoreLabeler):
        raise UserError(
            f"The labeler '{config.tables['labeler']['name']}' labels finished sets only. Build "
            "the pairs without it, then: dpo-video label PAIRS --labeler NAME"
        )
    return config.labeler


def open_source(config: Config, model: VideoModel) -> OpenedSource:
    """What the pairs bring themselves, or the user's clips, or the backbone's, or prompts alone."""
    assert config.pairs is not None
    run = config.run
    if isinstance(config.pairs, SuppliedPairs):
        if run.clips is not None:
            raise UserError(
                f"Pairs of kind '{config.tables['pairs']['name']}' are made of files of their own, "
                "and of no clips. Leave --clips out."
            )
        own = config.pairs.source(model, run.prompt)
        return OpenedSource(
            clips=in_order(own.clips),
            fingerprint=own.fingerprint,
            count=own.count,
            skipped=own.skipped,
        )
    if run.clips is not None:
        folder = open_clips(Path(run.clips), model.shape, run.prompt)
        return OpenedSource(
            clips=folder.cycle, fingerprint=folder.fingerprint, skipped=folder.skipped
        )
    backbone = config.tables["backbone"]["name"]
    drawn = config.backbone.clips(run.seed)
    if drawn is not None:
        return OpenedSource(clips=in_order(drawn), fingerprint=f"{backbone}'s own")
    if config.pairs.needs_video:
        raise UserError(
            f"Pairs of kind '{config.tables['pairs']['name']}' are made of real videos, and the "
            f"backbone '{backbone}' has none of its own. Name a folder with --clips DIR."
        )
    prompts = [run.prompt] if run.prompt else config.backbone.prompts(PROMPTS)
    fingerprint = "prompts: " + " | ".join(prompts)
    return OpenedSource(clips=cycle_prompts(prompts), fingerprint=fingerprint)


def open_store(
    config: Config, builder: PairBuilder, model: VideoModel, clips: str, where: Path, exact: bool
) -> PairStore:
    """The store that this configuration's pairs belong in, new or begun.

    Its folder is `where` itself if `exact`, else one under `where` that is named after a hash of
    all that the pairs depend on, so that equal recipes find each other's pairs.
    """
    tables: Tables = {
        name: config.tables.get(name, {}) for name in ("backbone", "pairs", "labeler")
    }
    precision = config.train.mixed_precision
    if precision != "no":  # it shapes the latents, and the model's identity with them
        tables["train"] = {"mixed_precision": precision}
    if config.memory.quantization != "native":  # it shapes what the model draws
        tables["memory"] = {"quantization": config.memory.quantization}
    manifest = Manifest(
        recipe={**tables, "seed": config.run.seed, "clips": clips},
        identity=model.identity,
        latent_shape=model.latent_shape,
        fps=model.shape.fps,
    )
    names = f"{config.tables['pairs']['name']}-{config.tables['backbone']['name']}"
    return PairStore.create(where if exact else where / f"{names}-{manifest.key}", manifest)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A configuration and its pairs, with the labels that it names."""

    config: Config
    """`train.labels` in it says what the labels were, so that no others pass for them."""
    store: PairStore
    pairs: int
    """How many have a label; the others are not trained on."""


def apply_labels(config: Config, store: PairStore) -> Labelled:
    """Put the labels of `train.labels` in the place of the pairs' own, if there are any."""
    for name in config.train.labels:
        store.fetch_labels(name.partition("@")[0])
    label_sets = open_label_sets(store.folder, config.train.labels)
    if not label_sets:
        return Labelled(config=config, store=store, pairs=len(store))
    for label_set in label_sets:
        if label_set.recipe.pairs != store.manifest.key:
            raise StoreError(
                f"'{label_set.path}' holds labels of other pairs than '{store.where}'. Label "
                f"these: dpo-video label {store.where} --labeler NAME --as ANOTHER"
            )
    preferred = preferences(label_sets, store.manifest.latent_shape[1])
    names = tuple(label_set.pinned for label_set in label_sets)
    train = config.train.model_copy(update={"labels": names})
    tables = {**config.tables, "train": {**config.tables["train"], "labels": list(names)}}
    return Labelled(
        config=replace(config, train=train, tables=tables),
        store=store.relabelled(preferred),
        pairs=sum(pair < len(store) for pair in preferred),
    )


def as_launched(config: Config) -> Config:
    """The configuration as the launcher's own settings change it.

    What FSDP and DeepSpeed would do to a model is done by `memory` here: only frozen weights are
    large, and they have no gradients to be reduced.

    Raises:
        UserError: if weights are to be shared among other processes than there are, or DeepSpeed's
            file cannot be read.
    """
    asked = launcher_request()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    memory = config.memory
    changes = {
        "shard": world if asked.shared and memory.shard == 1 else memory.shard,
        "offload": tuple(dict.fromkeys((*memory.offload, *asked.waits))),
    }
    memory = memory.model_copy(update=changes)
    if world % memory.shard:
        raise UserError(
            f"memory.shard={memory.shard} does not divide this run's number of processes, {world}. "
            f"Set it to {world} or a divisor, or launch as many: accelerate launch "
            f"--num_processes {memory.shard} -m dpo_video train ..."
        )
    if memory.shard > 1 and config.pairs is not None:
        raise UserError(
            "Pairs are built by each process alone, and memory.shard leaves none of them a whole "
            "model. Build them first (dpo-video build, with memory.offload=blocks where the model "
            "is too large), then train with --pairs FOLDER/."
        )
    told = {"shard": memory.shard, "offload": list(memory.offload)}
    tables = {**config.tables, "memory": {**config.tables["memory"], **told}}
    return replace(config, memory=memory, tables=tables)


def accelerator_for(config: Config, folder: Path) -> Accelerator:
    """Accelerate's object for a run: device, precision, tracker."""
    device = pick_device(config.run.device)
    name = config.train.report_to
    meeting = distributed.url()
    try:
        accelerator = Accelerator(
            kwargs_handlers=[InitProcessGroupKwargs(init_method=meeting)] if meeting else [],
            cpu=device.type == "cpu",
            mixed_precision=config.train.mixed_precision,
            log_with=None if name == "none" else name,
            project_dir=folder,
        )
    except ValueError as error:
        raise UserError(
            f"train.report_to or train.mixed_precision does not work here: {error} "
            "Set train.report_to=none or train.mixed_precision=no."
        ) from error
    if name != "none":
        accelerator.init_trackers("tracker")
    return accelerator
