"""A run's state on disk without pickle, and what it must be gone on with.

    step_000200/adapter/              in PEFT's format
    step_000200/state.safetensors     step, optimizer, generators: tensors, the rest as JSON
    step_000200/checkpoint.json       the seal: a hash of every file, and the run's identity

A checkpoint whose files are not those of its seal is damaged, whatever they would load as.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dpo_video.digests import file_digest
from dpo_video.errors import RunError
from dpo_video.files import sync, write_tensors, write_text

SEAL = "checkpoint.json"
_TENSOR, _PAIRS = "__tensor__", "__pairs__"
_MEANINGS = {
    "base": "the base model's weights or their precision",
    "adapter": "train.rank, its layers or run.seed: it is of an adapter of another shape or start",
    "weights": "the precision of the weights in memory (train.precision or a quantization)",
    "precision": "train.precision",
    "count": "how many pairs there are",
    "pairs": "the set of pairs",
    "labels": "the labels",
}


class Identity(BaseModel):
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
    identity: Identity
    files: dict[str, str]
    """SHA-256 by path in the folder."""


def seal(folder: Path, step: int, identity: Identity) -> None:
    """Write a finished checkpoint's hashes and sync all of its files to the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = file_digest(path)
    made = Seal(step=step, identity=identity, files=files)
    write_text(folder / SEAL, made.model_dump_json(indent=2) + "\n")


def check_seal(folder: Path, identity: Identity | None = None) -> None:
    """See that a checkpoint is whole, and may be gone on with by a run of this identity.

    Raises:
        RunError: if it is damaged, or if something has changed since it was written.
    """
    try:
        found = Seal.model_validate_json((folder / SEAL).read_bytes())
    except (OSError, ValidationError) as error:
        raise damaged(folder, f"it has no sound {SEAL}") from error
    for file, digest in found.files.items():
        inside = folder / file
        if ".." in Path(file).parts or not inside.is_file() or file_digest(inside) != digest:
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


def load_adapter(network: nn.Module, folder: Path, instead: str) -> PeftModel:
    """Put an adapter of PEFT's format on a network.

    Args:
        network: The bare denoiser.
        folder: The adapter's.
        instead: What to do where it does not fit: a sentence.

    Raises:
        RunError: if it is damaged, no LoRA, or does not fit.
    """
    if (folder.parent / SEAL).exists():
        check_seal(folder.parent)
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise ValueError("adapter_config.json describes no LoRA")
        if not (folder / "adapter_model.safetensors").is_file():
            raise ValueError("it has no adapter_model.safetensors")
        return PeftModel.from_pretrained(network, str(folder))
    except Exception as error:  # a stranger's file may make PEFT raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"The adapter in '{folder}' does not fit this backbone ({reason}). {instead}"
        ) from error


def save_state(path: Path, state: Any) -> None:
    """Write a tree of dicts, lists, numbers, strings and tensors to one safetensors file.

    The file appears whole or not at all.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_pack(state, tensors))
    write_tensors(path, tensors, metadata={"state": skeleton})


def load_state(path: Path) -> Any:
    """Read back what `save_state` wrote, tensors on the CPU.

    Raises:
        ValueError: if it is not such a file.
        OSError, SafetensorError: if it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("state")
    if text is None:
        raise ValueError("it holds no state")
    tensors = load_file(path)
    try:
        return _unpack(json.loads(text), tensors)
    except (TypeError, LookupError, ValueError, RecursionError) as error:
        raise ValueError(f"its state cannot be read: {error}") from error


def _pack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        name = str(len(tensors))
        tensors[name] = node.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(node, dict):
        # JSON keys are strings; optimizer states are keyed by integers.
        return {_PAIRS: [[key, _pack(value, tensors)] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        return [_pack(value, tensors) for value in node]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"a state cannot hold a {type(node).__name__}")


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(value, tensors) for value in node]
    if isinstance(node, dict):
        if _TENSOR in node:
            return tensors[node[_TENSOR]]
        return {key: _unpack(value, tensors) for key, value in node[_PAIRS]}
    return node
