"""A run's state on disk without pickle, and what must be unchanged to resume from it.

    step_000200/adapter/              in PEFT's format
    step_000200/state.safetensors     step, optimizer, generators: tensors, the rest as JSON
    step_000200/checkpoint.json       the manifest: a hash of every file, and the run's fingerprint

A checkpoint whose files differ from its manifest is damaged, even if they load.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from peft import PeftModel, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from dpo_video.data.store import PairStore
from dpo_video.errors import RunError
from dpo_video.extensions import Listener
from dpo_video.paths import is_inside
from dpo_video.strategies import ReferenceModel, VideoModel
from dpo_video.support.atomic import sync, write_text
from dpo_video.support.hashing import file_digest, tensors_digest
from dpo_video.support.reading import open_regular, read_bytes
from dpo_video.support.rng import global_states, set_global_states
from dpo_video.support.tensor_tree import load_state, save_state
from dpo_video.training.adapter_config import read_lora_config
from dpo_video.training.run_dir import LATEST, checkpoint_at, checkpoints, resumable

MANIFEST = "checkpoint.json"
_MEANINGS = {
    "base": "the base model's weights or their precision",
    "adapter": "train.rank, its layers or run.seed (it is of an adapter of another shape or start)",
    "weights": "the precision of the weights in memory (train.mixed_precision or a quantization)",
    "precision": "train.mixed_precision",
    "count": "how many pairs there are",
    "pairs": "the set of pairs",
    "labels": "the labels",
}


class RunFingerprint(BaseModel):
    """What must be unchanged to resume a run: the reference, and what it learns from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    """Hash of the base's weights."""
    adapter: str
    """Hash of the adapter at the start, where it adds nothing to the base."""
    weights: str
    """Data types of the base's weights in memory; quantized ones are bytes."""
    precision: str
    """Mixed precision of the forward passes."""
    recipe: str
    """Hash of the pair set's manifest."""
    pairs: str
    """Hash of the pair set's manifest and index."""
    count: int
    """Number of pairs."""
    labels: str
    """Hash of the labels that replace the pairs' own; "" if none do."""

    @classmethod
    def of(cls, model: VideoModel, store: PairStore, policy: PeftModel, precision: str) -> Self:
        """Fingerprint of a run before its first step."""
        named = dict(policy.named_parameters())
        base = {str(p.dtype).removeprefix("torch.") for n, p in named.items() if ".lora_" not in n}
        return cls(
            base=model.identity,
            adapter=tensors_digest({n: p for n, p in named.items() if ".lora_" in n})[:16],
            weights=" ".join(sorted(base)),
            precision=precision,
            recipe=store.manifest.key,
            pairs=store.digest,
            count=len(store),
            labels=store.labels_digest,
        )


class CheckpointManifest(BaseModel):
    """Hashes of a checkpoint's other files, and the run that it belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["dpo-video checkpoint"] = "dpo-video checkpoint"
    version: Literal[1] = 1
    step: int
    fingerprint: RunFingerprint
    files: dict[str, str]
    """SHA-256 by path in the folder."""
    options: dict[str, Any] = {}
    """The run's options by path ("train.learning_rate") when it was written."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An undamaged checkpoint."""

    folder: Path
    manifest: CheckpointManifest


def write_manifest(
    folder: Path, step: int, fingerprint: RunFingerprint, options: Mapping[str, Any] | None = None
) -> None:
    """Write the manifest of a complete checkpoint and sync all of its files to the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = file_digest(path)
    manifest = CheckpointManifest(
        step=step, fingerprint=fingerprint, files=files, options=dict(options or {})
    )
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def check_manifest(folder: Path, part: str = "") -> CheckpointManifest:
    """The manifest of a checkpoint, after a check of its files, or of those below `part`.

    Raises:
        RunError: if it is damaged.
    """
    try:
        found = CheckpointManifest.model_validate_json(read_bytes(folder / MANIFEST))
    except (OSError, ValidationError) as error:
        raise damaged(folder, f"its {MANIFEST} is missing or invalid") from error
    for file, digest in found.files.items():
        if not file.startswith(part):
            continue
        try:
            same = is_inside(file) and file_digest(folder / file) == digest
        except (OSError, ValueError):  # no such file, or no possible file name
            same = False
        if not same:
            raise damaged(folder, f"{file} is not what was written")
    return found


def newest_checkpoint(out: Path, note: Callable[[str], None] = lambda text: None) -> Checkpoint:
    """The newest undamaged checkpoint to resume from; `note` receives a sentence on damaged ones.

    Raises:
        RunError: if there is none.
    """
    faults = []
    for folder in resumable(out):
        try:
            manifest = check_manifest(folder)
        except RunError as error:
            faults.append(error)
            continue
        for fault in faults:
            note(f"{fault} The run is resumed from '{folder.name}'.")
        return Checkpoint(folder=folder, manifest=manifest)
    if faults:
        raise RunError(
            f"'{out}' has no undamaged checkpoint to resume from: {faults[0]} To start again, "
            f"delete '{out / 'checkpoints'}'."
        )
    raise RunError(f"'{out}' has no checkpoint yet. Train it without --resume.")


def check_unchanged(checkpoint: Checkpoint, now: RunFingerprint) -> None:
    """Check that a run with this fingerprint may be resumed from a checkpoint.

    Raises:
        RunError: if something has changed since it was written.
    """
    before, after = checkpoint.manifest.fingerprint.model_dump(), now.model_dump()
    for name, meaning in _MEANINGS.items():
        if before[name] != after[name]:
            raise RunError(
                f"Cannot resume from '{checkpoint.folder}': the reference or the pairs have "
                f"changed. What has changed: {meaning} (then {before[name] or 'none'}, now "
                f"{after[name] or 'none'}). Restore it, or start a new run with another --out."
            )


def damaged(folder: Path, reason: str) -> RunError:
    """The error for a checkpoint that does not load."""
    return RunError(f"The checkpoint '{folder}' is damaged ({reason}). Use an earlier one.")


@contextmanager
def kept_adapter(out: Path, step: int | None) -> Iterator[Path]:
    """The adapter of a run's checkpoint, as a copy that its training cannot delete meanwhile.

    Args:
        out: The run's folder.
        step: Step of the checkpoint; None for the latest.

    Raises:
        RunError: if there is no such checkpoint.
    """
    while True:
        source = checkpoint_at(out, step)
        with tempfile.TemporaryDirectory(prefix="dpo-video-") as folder:
            copy = Path(folder) / source.name
            try:
                _copy_adapter(source, copy)
            except OSError as error:
                if not source.exists():  # its training has deleted it; look again
                    continue
                raise damaged(source, error.strerror or "it cannot be copied") from error
            try:
                yield copy / "adapter"
            except RunError as error:
                raise RunError(str(error).replace(str(copy), str(source))) from error
            return


def _copy_adapter(source: Path, copy: Path) -> None:
    (copy / "adapter").mkdir(parents=True)
    for path in [*source.glob(MANIFEST), *(source / "adapter").iterdir()]:
        if not path.is_dir():
            with open_regular(path) as file, (copy / path.relative_to(source)).open("wb") as to:
                shutil.copyfileobj(file, to, 1 << 20)


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Progress of a run."""

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Position in the endless sequence of pairs, valid for any number of processes."""
    skipped: int = 0
    """Steps that were not finite."""


def write_checkpoint(
    folder: Path,
    policy: PeftModel,
    optimizer: Any,
    progress: TrainState,
    fingerprint: RunFingerprint,
    scaler: Any,
    options: Mapping[str, Any] | None = None,
    reference: ReferenceModel | None = None,
    listeners: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a checkpoint under another name, rename it, then update `latest`."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(partial / "adapter")
    state = {
        **asdict(progress),
        "optimizer": optimizer.state_dict(),
        "rng": global_states(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "reference": {} if reference is None else dict(reference.state()),
    }
    if listeners:
        state["listeners"] = {name: dict(each) for name, each in listeners.items()}
    save_state(partial / "state.safetensors", state)
    write_manifest(partial, progress.step, fingerprint, options)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync(folder.parent)
    write_text(folder.parent / LATEST, folder.name + "\n")


def write_start(folder: Path, policy: PeftModel) -> None:
    """Write the adapter of step 0 under another name, then rename it."""
    partial = folder.with_name(f".partial-{folder.name}")
    for each in (partial, folder):
        shutil.rmtree(each, ignore_errors=True)
    policy.save_pretrained(partial)
    partial.rename(folder)
    sync(folder.parent)


def drop_checkpoints(out: Path, step: int, limit: int | None) -> None:
    """Delete a run's oldest checkpoints, up to a step, until `limit` of them are left.

    Those after the step are kept: they belong to a run that was resumed from an earlier checkpoint.
    With None nothing is deleted.
    """
    if limit is None:
        return
    for partial in (out / "checkpoints").glob(".partial-step_*"):  # left by a killed process
        shutil.rmtree(partial)
    before = [folder for other, folder in checkpoints(out).items() if other < step]
    for folder in before[: max(0, len(before) + 1 - limit)]:
        partial = folder.with_name(f".partial-{folder.name}")  # never visible half deleted
        folder.rename(partial)
        shutil.rmtree(partial)


_OPTIONS = {"betas", "weight_decay"}  # of an optimizer, which a resumed run may change


def restore(
    checkpoint: Checkpoint,
    policy: PeftModel,
    optimizer: Any,
    scaler: Any,
    reference: ReferenceModel | None = None,
    listeners: Mapping[str, Listener] | None = None,
) -> TrainState:
    """Load a checkpoint into a run's adapter, optimizer, scaler, generators, reference, listeners.

    Files that agree with their manifest were written by this program for this run: if they do not
    load, that is a bug, and keeps its traceback.

    Raises:
        RunError: if its files cannot be read.
    """
    folder = checkpoint.folder
    try:
        state = load_state(folder / "state.safetensors")
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    except OSError as error:
        raise damaged(folder, error.strerror or "it cannot be read") from error
    set_peft_model_state_dict(policy, weights)
    chosen = [{key: group[key] for key in _OPTIONS & {*group}} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, options in zip(optimizer.param_groups, chosen, strict=True):
        group.update(options)  # `load_state_dict` has restored the checkpoint's
    if scaler is not None and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    set_global_states(state["rng"])
    if reference is not None and (saved := state.get("reference")):
        reference.restore(saved)
    for name, saved in state.get("listeners", {}).items():
        if listeners and name in listeners:
            listeners[name].restore(saved)
    return TrainState(**{name: state[name] for name in ("step", "position", "skipped")})


def load_adapter(
    network: nn.Module, folder: Path, instead: str, *, trainable: bool = False
) -> PeftModel:
    """Load an adapter in PEFT's format onto a network.

    Files from elsewhere may make PEFT raise anything. Undamaged files with a manifest of this
    program fail only on another network; any other exception is a bug, and keeps its traceback.

    Args:
        network: The denoiser without an adapter.
        folder: Folder of the adapter.
        instead: A sentence: what to do if it does not fit.
        trainable: Whether it is to be trained.

    Raises:
        RunError: if it is damaged, no LoRA, or does not fit.
    """
    ours = (folder.parent / MANIFEST).exists()
    if ours:
        check_manifest(folder.parent, "adapter/")

    def misfit(error: Exception) -> RunError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return RunError(
            f"The adapter in '{folder}' does not fit this backbone ({reason}). {instead}"
        )

    try:
        config = read_lora_config(folder / "adapter_config.json")
        if not (folder / "adapter_model.safetensors").is_file():
            raise ValueError("it has no adapter_model.safetensors")
    except (OSError, ValueError) as error:
        if ours:
            raise
        raise misfit(error) from error
    expected = (ValueError, RuntimeError) if ours else (Exception,)
    try:
        return PeftModel.from_pretrained(
            network, str(folder), config=config, is_trainable=trainable
        )
    except expected as error:  # no such modules; weights of another shape
        raise misfit(error) from error
