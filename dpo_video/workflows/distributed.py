"""What Accelerate's launcher asks for on FSDP's and DeepSpeed's behalf, put in our memory modes."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from torch.distributed import TCPStore  # type: ignore[attr-defined] # public by its documentation
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler

from dpo_video.errors import UserError

_ZERO = "ACCELERATE_DEEPSPEED_"
_ITS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_", _ZERO)
_HOSTS = ("cpu", "nvme")


@dataclass(frozen=True, kw_only=True)
class LauncherRequest:
    """What `memory` can do of them."""

    shared: bool
    """Whether the processes are to hold the weights together: FSDP, and ZeRO's third stage."""
    waits: tuple[Literal["blocks", "optimizer"], ...]
    """What is to wait in the host's memory."""


def launcher_request() -> LauncherRequest:
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
    return LauncherRequest(shared=shared, waits=(*waits, "optimizer") if optimizer else (*waits,))


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


_SCHEME = "dpo-video"
_POLL = 0.01  # seconds


def url() -> str | None:
    """What `init_process_group` is to meet at; None where torch's own way is sound."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"{_SCHEME}://" if shared else None


def apart(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The part of a store that the processes of this attempt have to themselves.

    Every process asks under a name never used before, so an answer to it cannot be an old one.
    Rank 0 may read an old question first; it goes on until all have thanked for this very answer.

    Raises:
        TimeoutError: if somebody is still missing.
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f"asks/{rank}", question)
        store.wait([f"answer/{question}"], timeout)
        name = store.get(f"answer/{question}").decode()
        store.set(f"thanks/{name}/{rank}", "")
        return PrefixStore(name, store)
    name, missing = uuid.uuid4().hex, set(range(1, world_size))
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(f"Processes {sorted(missing)} of {world_size} have not come.")
        for other in sorted(missing):
            if store.check([f"thanks/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", name)
        time.sleep(_POLL)
    return PrefixStore(name, store)


def _meet(_url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
    )
    yield apart(store, rank, world_size, timeout), rank, world_size


register_rendezvous_handler(_SCHEME, _meet)
