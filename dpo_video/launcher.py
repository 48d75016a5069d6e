"""What Accelerate's launcher asks for on FSDP's and DeepSpeed's behalf, put in our memory modes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_video.errors import UserError

_ZERO = "ACCELERATE_DEEPSPEED_"
_ITS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_", _ZERO)
_HOSTS = ("cpu", "nvme")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What `memory` can do of them."""

    shared: bool
    """Whether the processes are to hold the weights together: FSDP, and ZeRO's third stage."""
    waits: tuple[Literal["blocks", "optimizer"], ...]
    """What is to wait in the host's memory."""


def wishes() -> Wishes:
    """Read them, and take them out of the environment: Accelerate would act on them as well.

    Raises:
        UserError: if DeepSpeed's file cannot be read.
    """
    asked = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(_ITS)}
    shared = blocks = optimizer = False
    if asked.get("ACCELERATE_USE_FSDP") == "true":
        shared, blocks = True, asked.get("FSDP_OFFLOAD_PARAMS") == "true"
    if asked.get("ACCELERATE_USE_DEEPSPEED") == "true":
        file = asked.get(f"{_ZERO}CONFIG_FILE", "none")
        zero = _of_variables(asked) if file == "none" else _of_file(Path(file))
        shared = str(zero.get("stage")) == "3"
        blocks, optimizer = (
            zero.get(part, {}).get("device") in _HOSTS
            for part in ("offload_param", "offload_optimizer")
        )
    waits: list[Literal["blocks", "optimizer"]] = ["blocks"] if blocks else []
    return Wishes(shared=shared, waits=(*waits, "optimizer") if optimizer else (*waits,))


def _of_variables(asked: Mapping[str, str]) -> Mapping[str, Any]:
    return {
        "stage": asked.get(f"{_ZERO}ZERO_STAGE"),
        "offload_param": {"device": asked.get(f"{_ZERO}OFFLOAD_PARAM_DEVICE")},
        "offload_optimizer": {"device": asked.get(f"{_ZERO}OFFLOAD_OPTIMIZER_DEVICE")},
    }


def _of_file(file: Path) -> Mapping[str, Any]:
    try:
        zero: dict[str, Any] = json.loads(file.read_bytes())["zero_optimization"]
        parts = [part for name, part in zero.items() if name.startswith("offload_")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("what it offloads is not told in tables")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"DeepSpeed's '{file}' cannot be read ({error}). Correct its zero_optimization, or "
            "launch without it and set memory.shard and memory.offload."
        ) from error
    return zero
