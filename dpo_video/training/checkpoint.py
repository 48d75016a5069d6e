"""A run's state on disk without pickle, and what it must be gone on with.

    step_000200/adapter/              in PEFT's format
    step_000200/state.safetensors     step, optimizer, generators: tensors, the rest as JSON
    step_000200/checkpoint.json       the seal: a hash of every file, and the run's identity

A checkpoint whose files are not those of its seal is damaged, whatever they would load as.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import nn

from dpo_video.errors import RunError
from dpo_video.support.atomic import sync, write_text
from dpo_video.support.hashing import file_digest
from dpo_video.support.rng import global_states, set_global_states
from dpo_video.support.tensor_tree import load_state, save_state
from dpo_video.training.run_dir import LATEST, checkpoints, latest_checkpoint

SEAL = "checkpoint.json"
_MEANINGS = {
    "base": "the base model's weights or their precision",
    "adapter": "train.rank, its layers or run.seed: it is of an adapter of another shape or start",
    "weights": "the precision of the weights in memory (train.mixed_precision or a quantization)",
    "precision": "train.mixed_precision",
    "count": "how many pairs there are",
    "pairs": "the set of pairs",
    "labels": "the labels",
}


class RunFingerprint(BaseModel):
    """What a run may not be gone on without: the reference, and what it learns from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    """The hash of the base's weights."""
    adapter: str
    """The hash of the adapter's state at the start: the reference is the base with this adapter,
    which adds nothing to it."""
    weights: str
    """What the base's weights are held as in memory; quantized ones are bytes."""
    precision: str
    """Of the forward passes."""
    pairs: str
    """The hash of the set's manifest and lines."""
    count: int
    """How many pairs that are."""
    labels: str
    """The hash of the preferences that take the place of the pairs' own; "" where none do."""


class Seal(BaseModel):
    """What a checkpoint's other files must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["dpo-video checkpoint"] = "dpo-video checkpoint"
    version: Literal[1] = 1
    step: int
    identity: RunFingerprint
    files: dict[str, str]
    """SHA-256 by path in the folder."""


def seal(folder: Path, step: int, identity: RunFingerprint) -> None:
    """Write a finished checkpoint's hashes and sync all of its files to the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = file_digest(path)
    made = Seal(step=step, identity=identity, files=files)
    write_text(folder / SEAL, made.model_dump_json(indent=2) + "\n")


def check_seal(folder: Path, identity: RunFingerprint | None = None) -> None:
    """See that a checkpoint is whole, and may be gone on with by a run of this identity.

    Raises:
        RunError: if it is damaged, or if something has changed since it was written.
    """
    try:
        found = Seal.model_validate_json((folder / SEAL).read_bytes())
    except (OSError, ValidationError) as error:
        raise damaged(folder, f"it has no sound {SEAL}") from error
    for file, digest in found.files.items():
        try:
            whole = ".." not in Path(file).parts and file_digest(folder / file) == digest
        except (OSError, ValueError):  # there is none, or no file can have that name
            whole = False
        if not whole:
            raise damaged(folder, f"{file} is not what was written")
    if identity is None:
        return
    then, now = found.identity.model_dump(), identity.model_dump()
    for name, meaning in _MEANINGS.items():
        if then[name] != now[name]:
            raise RunError(
                f"'{folder}' cannot be gone on with, because its reference or its pairs would no "
                f"longer be the same. What has changed: {meaning} (then {then[name] or 'none'}, "
                f"now {now[name] or 'none'}). Put that back, or begin a new run with another --out."
            )


def sealed_count(folder: Path) -> int | None:
    """How many pairs a checkpoint's run learns from; None if nobody wrote it down."""
    try:
        return Seal.model_validate_json((folder / SEAL).read_bytes()).identity.count
    except (OSError, ValidationError):
        return None  # `check_seal` says what is wrong


def damaged(folder: Path, reason: str) -> RunError:
    """The sentence for a checkpoint that does not load."""
    return RunError(
        f"The checkpoint '{folder}' is damaged, or of an adapter of another shape ({reason}). "
        f"Write the name of an earlier one into '{folder.parent / 'latest'}', or train again."
    )


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """How far a run has come."""

    step: int = 0
    place: int = 0
    """In the endless sequence of pairs, which any number of processes goes on with."""
    skipped: int = 0
    """Steps that were not finite."""


def write_checkpoint(
    folder: Path,
    policy: PeftModel,
    optimizer: Any,
    place: TrainState,
    identity: RunFingerprint,
    scaler: Any,
) -> None:
    """Write a checkpoint under another name, rename it, then move the pointer to it."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(partial / "adapter")
    state = {
        **asdict(place),
        "optimizer": optimizer.state_dict(),
        "rng": global_states(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    save_state(partial / "state.safetensors", state)
    seal(partial, place.step, identity)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync(folder.parent)
    write_text(folder.parent / LATEST, folder.name + "\n")


def drop_checkpoints(out: Path, step: int, keep: int | None) -> None:
    """Delete a run's checkpoints before a step, but for as many of the newest as are to be kept.

    The step's own is one of these. Those after it, of a run that went back, are left alone. None
    keeps all.
    """
    if keep is None:
        return
    for gone in (out / "checkpoints").glob(".partial-step_*"):  # of a call that was killed
        shutil.rmtree(gone)
    before = [folder for other, folder in checkpoints(out).items() if other < step]
    for folder in before[: max(0, len(before) + 1 - keep)]:
        gone = folder.with_name(f".partial-{folder.name}")  # nobody finds half of it
        folder.rename(gone)
        shutil.rmtree(gone)


def restore(
    out: Path, policy: PeftModel, optimizer: Any, identity: RunFingerprint, scaler: Any
) -> TrainState:
    """Put a run's newest checkpoint into its adapter, optimizer, loss scaler and generators.

    Behind a seal that holds is what this program wrote for this very run: where it does not load
    all the same, that is a bug, and keeps its traceback.

    Raises:
        RunError: if there is none, it is damaged, or it is of another identity.
    """
    folder = latest_checkpoint(out)
    check_seal(folder, identity)
    try:
        state = load_state(folder / "state.safetensors")
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    except OSError as error:
        raise damaged(folder, error.strerror or "it cannot be read") from error
    set_peft_model_state_dict(policy, weights)
    optimizer.load_state_dict(state["optimizer"])
    if scaler is not None and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    set_global_states(state["rng"])
    return TrainState(**{name: state[name] for name in ("step", "place", "skipped")})


def load_adapter(network: nn.Module, folder: Path, instead: str) -> PeftModel:
    """Put an adapter of PEFT's format on a network.

    A stranger's files may make PEFT raise anything. Of those that this program has sealed, and that
    are whole, only another network can be the reason; whatever else they raise is a bug, and keeps
    its traceback.

    Args:
        network: The bare denoiser.
        folder: The adapter's.
        instead: What to do where it does not fit: a sentence.

    Raises:
        RunError: if it is damaged, no LoRA, or does not fit.
    """
    expected: tuple[type[Exception], ...] = (Exception,)
    if (folder.parent / SEAL).exists():
        check_seal(folder.parent)
        expected = (ValueError, RuntimeError)  # no such modules; weights of another shape
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise ValueError("adapter_config.json describes no LoRA")
        if config.get("lora_bias"):  # a layer without a bias has nothing to merge it into
            raise ValueError("its LoRA has biases, which none of dpo-video's has")
        if not (folder / "adapter_model.safetensors").is_file():
            raise ValueError("it has no adapter_model.safetensors")
        return PeftModel.from_pretrained(network, str(folder))
    except expected as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"The adapter in '{folder}' does not fit this backbone ({reason}). {instead}"
        ) from error
