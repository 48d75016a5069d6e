"""Load what a resolved configuration names: the device, the model, the clips and the pairs."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from dpo_video.data.build import Source, cycle_prompts, in_order
from dpo_video.data.clips import open_clips
from dpo_video.data.labels import open_label_sets, preferences
from dpo_video.data.prompts import load_prompts, prompt_table
from dpo_video.data.store import Manifest, PairStore
from dpo_video.errors import StoreError, UserError
from dpo_video.memory.packed_weights import check_base, frozen_weights, pack_frozen_weights
from dpo_video.registry.attribution import made_by
from dpo_video.registry.returned import wrong
from dpo_video.strategies import (
    PACKED,
    Backbone,
    Labeler,
    StoreLabeler,
    SuppliedPairs,
    VideoModel,
)
from dpo_video.support.atomic import writing
from dpo_video.support.formatting import counted
from dpo_video.support.reproducibility import settle
from dpo_video.text import command
from dpo_video.training import trackers
from dpo_video.types import Placement, Prompt, Remark, Skipped
from dpo_video.workflows import distributed
from dpo_video.workflows.config import Config
from dpo_video.workflows.presets import Tables

_OURS = "dpo-video"
NUM_PROMPTS = 47  # of an evaluation, of the backbone's own


def evaluation_prompts(
    config: Config, note: Callable[[str], None] = lambda text: None
) -> list[Prompt]:
    """The prompt and the seed of each video of an evaluation.

    Args:
        config: Its `evaluate` names the prompts.
        note: Receives a sentence on columns of the file that are not read.

    Raises:
        UserError: if the file of prompts cannot be read or has too few.
    """
    settings = config.evaluate
    count, each = settings.num_prompts, settings.num_videos_per_prompt
    if settings.prompts is None:
        prompts = [Prompt(text=text) for text in config.backbone.prompts(count or NUM_PROMPTS)]
    else:
        prompts = load_prompts(settings.prompts, note)
        if count is not None and count > len(prompts):
            raise UserError(
                f"'{settings.prompts}' has {counted(len(prompts), 'prompt')}, fewer than "
                "--num-prompts "
                f"{count}. Leave --num-prompts out, or draw more videos of each prompt "
                "(--num-videos-per-prompt)."
            )
        prompts = prompts[:count]
    if len(prompts) * each < 2:
        raise UserError(
            "An evaluation needs two videos or more of each model. Add prompts, or draw more "
            "videos of each (--num-videos-per-prompt)."
        )
    return prompt_table(prompts, each, settings.seed)


def validation_prompts(
    config: Config, note: Callable[[str], None] = lambda text: None
) -> list[Prompt]:
    """The prompts of the validation videos; none for those of the first pairs.

    Raises:
        UserError: if the file of prompts cannot be read.
    """
    settings = config.train
    if settings.validation_prompts is None:
        return []
    return load_prompts(settings.validation_prompts, note)[: settings.validation_videos]


def pick_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is the best available one."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        name = available[0]
    own = os.environ.get("LOCAL_RANK", "")  # set by a launcher
    if name == "cuda" and own.isdecimal() and int(own) < torch.cuda.device_count():
        name = f"cuda:{own}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"'{name}' is not a device. Choose one of {', '.join(available)}."
        ) from error
    if device.type not in available:
        raise UserError(
            f"The device '{device.type}' is not available to this torch. Choose one of "
            f"{', '.join(available)}."
        )
    return device


def load_model(config: Config, device: torch.device) -> VideoModel:
    """Load the backbone's model in the precision of `train.mixed_precision`."""
    settle(config.run.deterministic)
    dtypes = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    # One progress bar per file of a checkpoint tells nothing useful.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    memory, dtype = config.memory, dtypes[config.train.mixed_precision]
    on_host = "blocks" in memory.offload
    # A single process that evaluates a sharded run holds all weights itself.
    shared = memory.shard > 1 and torch.distributed.is_initialized()
    pack_text = None
    if memory.text_encoder == "host":
        pack_text = partial(pack_frozen_weights, device=device, base="native", on_host=True)
    placement = Placement(device, dtype, denoiser_on_host=shared, pack_text_encoder=pack_text)
    if memory.quantization == "native" and (shared or not on_host):
        return _loaded(config.backbone, placement)
    check_base(memory.quantization)
    pack = partial(pack_frozen_weights, device=device, base=memory.quantization, on_host=on_host)
    model = _loaded(config.backbone, replace(placement, pack=pack, denoiser_on_host=False))
    if next(frozen_weights(model.denoiser), None) is None:  # the backbone ignored `pack`
        pack(model.denoiser)
    if memory.quantization != "native":
        model.identity += f"{PACKED}{memory.quantization}"
    return model


def _loaded(backbone: Backbone, placement: Placement) -> VideoModel:
    model = backbone.load(placement)
    if not isinstance(model, VideoModel):
        raise wrong(backbone, f"loads a {type(model).__name__}, not a VideoModel")
    return model


@dataclass(frozen=True, kw_only=True)
class OpenedSource:
    """A supply of clips."""

    clips: Source
    fingerprint: str
    """A hash or a name that identifies them."""
    count: int | None = None
    """Largest number of clips; None if they are endless."""
    skipped: Sequence[Skipped] = ()
    """Files without a usable clip; grows while clips are read."""
    remarks: Sequence[Remark] = ()
    """On files that are used; grows while clips are read."""
    contents: str = ""
    """The files by type, such as "2 mp4, 1 webp"."""


def builder_labeler(config: Config) -> Labeler | None:
    """The labeler that pairs are built with; None for pairs that are built or need none.

    Call it before anything is loaded: it raises a UserError if builder and labeler do not match.
    """
    if config.pairs is None:
        return None
    kind = config.tables["pairs"]["name"]
    if config.labeler is None and config.pairs.needs_labeler:
        raise UserError(
            f"Pairs of kind '{kind}' need a labeler that ranks the videos. Choose one with "
            "--labeler NAME (see `dpo-video list labeler`)."
        )
    if config.labeler is not None and not config.pairs.asks_labeler:
        raise UserError(
            f"Pairs of kind '{kind}' take no labeler: the way they are built decides which video "
            "is better. Leave --labeler out, or label the finished pairs: dpo-video label PAIRS "
            "--labeler NAME"
        )
    if isinstance(config.labeler, StoreLabeler):
        raise UserError(
            f"The labeler '{config.tables['labeler']['name']}' labels finished pairs only. Build "
            "the pairs without it, then: dpo-video label PAIRS --labeler NAME"
        )
    return config.labeler


def open_source(
    config: Config, model: VideoModel, note: Callable[[str], None] = lambda text: None
) -> OpenedSource:
    """The builder's own clips, or else the user's, the backbone's, or prompts alone.

    Args:
        config: The configuration.
        model: The model that builds the pairs.
        note: Receives a sentence on columns of a file of prompts that are not read.
    """
    assert config.pairs is not None
    run = config.run
    _check_prompts(config)
    if isinstance(config.pairs, SuppliedPairs):
        if run.clips is not None:
            raise UserError(
                f"Pairs of kind '{config.tables['pairs']['name']}' bring their own files and use "
                "no clips. Leave --clips out."
            )
        own = config.pairs.source(model, run.prompt)
        return OpenedSource(
            clips=in_order(own.clips),
            fingerprint=own.fingerprint,
            count=own.count,
            skipped=own.skipped,
            remarks=own.remarks,
            contents=own.contents,
        )
    if run.clips is not None:
        folder = open_clips(
            Path(run.clips),
            model.shape,
            run.prompt,
            slow_down=run.slow_down,
            scene_cuts=run.scene_cuts,
        )
        return OpenedSource(
            clips=folder.cycle,
            fingerprint=folder.fingerprint,
            skipped=folder.skipped,
            remarks=folder.remarks,
            contents=folder.contents,
        )
    backbone = config.tables["backbone"]["name"]
    drawn = config.backbone.clips(run.seed)
    unprompted = run.prompt is None and config.build.prompts is None
    if drawn is not None and (unprompted or config.pairs.needs_video):
        return OpenedSource(clips=in_order(drawn), fingerprint=f"{backbone}'s own")
    if config.pairs.needs_video:
        raise UserError(
            f"Pairs of kind '{config.tables['pairs']['name']}' are made of real videos, and the "
            f"backbone '{backbone}' has none of its own. Name a folder with --clips DIR."
        )
    if run.prompt:
        prompts = [Prompt(text=run.prompt)]
    else:
        prompts = load_prompts(config.build.prompts or "training", note)
    content = json.dumps([asdict(prompt) for prompt in prompts])
    return OpenedSource(
        clips=cycle_prompts(prompts),
        fingerprint=f"prompts: {hashlib.sha256(content.encode()).hexdigest()[:16]}",
        contents=f"{counted(len(prompts), 'prompt')}" if config.build.prompts else "",
    )


def _check_prompts(config: Config) -> None:
    """Refuse prompts for pairs that have others."""
    if config.build.prompts is None:
        return
    kind = config.tables["pairs"]["name"]
    if config.run.prompt is not None:
        raise UserError("--prompt and --prompts exclude each other. Leave one of them out.")
    if isinstance(config.pairs, SuppliedPairs) or config.run.clips is not None:
        what = "their files bring" if isinstance(config.pairs, SuppliedPairs) else "clips bring"
        raise UserError(
            f"Pairs of kind '{kind}' use no --prompts here: {what} their own captions. Leave "
            "--prompts out."
        )
    assert config.pairs is not None
    if config.pairs.needs_video:
        raise UserError(
            f"Pairs of kind '{kind}' are made of real videos, which bring their own captions. "
            "Leave --prompts out, or build pairs of prompts (--pairs ranked, jitter or img2img)."
        )


def store_manifest(config: Config, model: VideoModel, clips: str) -> Manifest:
    """The manifest of a configuration's pairs: everything that they depend on."""
    tables: Tables = {
        name: config.tables.get(name, {}) for name in ("backbone", "pairs", "labeler")
    }
    precision = config.train.mixed_precision
    if precision != "no":  # it changes the latents and the model's identity
        tables["train"] = {"mixed_precision": precision}
    if config.memory.quantization != "native":  # it changes the model's samples
        tables["memory"] = {"quantization": config.memory.quantization}
    assert config.pairs is not None
    used = (config.pairs, config.labeler, config.backbone)
    versions = {_OURS: version(_OURS), **dict(filter(None, map(made_by, used)))}
    if (number := config.pairs.pairs_version) > 1:
        versions[(made_by(config.pairs) or (_OURS,))[0]] += f", pairs version {number}"
    return Manifest(
        recipe={**tables, "seed": config.run.seed, "clips": clips},
        identity=model.identity,
        latent_shape=model.latent_shape,
        fps=model.shape.fps,
        versions=versions,
    )


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A configuration and its pairs, with the labels of `train.labels` applied."""

    config: Config
    """Its `train.labels` are pinned by their hash, so that changed labels are detected."""
    store: PairStore
    pairs: int
    """Number of labelled pairs; the others are not trained on."""


def apply_labels(config: Config, store: PairStore) -> Labelled:
    """Replace the pairs' own labels by those of `train.labels`, if any are named."""
    for name in config.train.labels:
        store.fetch_labels(name.partition("@")[0])
    label_sets = open_label_sets(store.folder, config.train.labels)
    if not label_sets:
        return Labelled(config=config, store=store, pairs=len(store))
    for label_set in label_sets:
        if label_set.recipe.pairs != store.manifest.key:
            labeler = str(label_set.recipe.labeler.get("name", "metric"))
            again = ("--labeler", labeler, "--as", f"{label_set.path.stem}-2")
            raise StoreError(
                f"'{label_set.path}' holds labels of other pairs than '{store.where}'. Label "
                f"these: {command('label', store.where, *again)}"
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


def accelerator_for(config: Config, folder: Path) -> Accelerator:
    """The Accelerator of a run, with its device and precision; nothing is written."""
    device = pick_device(config.run.device)
    name = config.train.report_to
    rendezvous = distributed.rendezvous_url()
    if not torch.distributed.is_initialized():  # another run of this process may have set another
        AcceleratorState._reset_state(reset_partial_state=True)
    if name in LOGGER_TYPE_TO_CLASS and name not in map(str, get_available_trackers()):
        raise UserError(
            f"train.report_to={name} needs a package that is not installed. Install it: pip "
            f"install {name.replace('_', '-')}. Or log to TensorBoard: "
            "--set train.report_to=tensorboard"
        )
    try:
        accelerator = Accelerator(
            kwargs_handlers=[InitProcessGroupKwargs(init_method=rendezvous)] if rendezvous else [],
            cpu=device.type == "cpu",
            mixed_precision=config.train.mixed_precision,
            log_with=None if name == "none" else name,
            project_dir=folder,
        )
    except ValueError as error:
        raise UserError(
            f"train.report_to or train.mixed_precision does not work on this machine: {error} "
            "Set train.report_to=none or train.mixed_precision=no."
        ) from error
    return accelerator


def start_trackers(
    accelerator: Accelerator, config: Config, folder: Path, *, resumed: bool = False
) -> None:
    """Open the tracker of a run; it writes to the run's folder."""
    if config.train.report_to != "none":
        threading.excepthook = _report_in_thread
        with writing(folder):
            trackers.start(
                accelerator,
                config.train.report_to,
                folder=folder,
                project=config.train.project,
                run_name=config.train.run_name or folder.resolve().name,
                tables=config.tables,
                toml=config.toml(),
                resumed=resumed,
            )


def _report_in_thread(error: threading.ExceptHookArgs) -> None:
    """Print an exception that ended a thread, unless the tracker's writer raises it once more."""
    module = type(error.thread).__module__
    if not (isinstance(error.exc_value, OSError) and module.startswith("tensorboard.")):
        threading.__excepthook__(error)


def check_pairs(config: Config, store: PairStore, model: VideoModel) -> None:
    """A StoreError unless the pairs were made with this model, shape and precision."""
    then = store.manifest.recipe.get("train", {}).get("mixed_precision", "no")
    now = config.train.mixed_precision
    made_with = store.manifest.recipe.get("backbone") or config.tables["backbone"]
    same = made_with.get("name") == config.tables["backbone"]["name"]
    if same and then != now and store.manifest.identity != model.identity:
        raise StoreError(
            f"The pairs in '{store.where}' were made with train.mixed_precision={then}, and this "
            f"run has train.mixed_precision={now}, which changes the latents. Set "
            f"train.mixed_precision={then} (--set overrides a tier), or build pairs with {now}."
        )
    store.check_fits(model)
