"""Several processes: what their launcher requests for FSDP and DeepSpeed, and how they meet."""

from __future__ import annotations

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
from dpo_video.support.reading import parse_json, read_bytes

_ZERO = "ACCELERATE_DEEPSPEED_"
_PREFIXES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_", _ZERO)
_HOST_DEVICES = ("cpu", "nvme")


@dataclass(frozen=True, kw_only=True)
class LauncherRequest:
    """A launcher's FSDP or DeepSpeed settings, as far as [memory] can provide them."""

    shard: bool
    """Whether the processes share the weights: FSDP, and stage 3 of ZeRO."""
    offload: tuple[Literal["blocks", "optimizer"], ...]
    """What is kept in CPU memory."""


def process_count() -> int:
    """Number of processes that the launcher started for this run."""
    world = os.environ.get("WORLD_SIZE", "1")
    return int(world) if world.isdecimal() else 1


def is_main_process() -> bool:
    """Whether this is the process that writes, before the processes have met."""
    rank = os.environ.get("RANK", "0")
    return not (rank.isdecimal() and 0 < int(rank) < process_count())


def launcher_request() -> LauncherRequest:
    """Read the launcher's settings and remove them from the environment.

    Accelerate would otherwise apply FSDP or DeepSpeed itself.

    Raises:
        UserError: if DeepSpeed's file cannot be read.
    """
    names = [name for name in os.environ if name.startswith(_PREFIXES)]
    given = {name: os.environ.pop(name) for name in names}
    shard = blocks = optimizer = False
    if given.get("ACCELERATE_USE_FSDP") == "true":
        shard, blocks = True, given.get("FSDP_OFFLOAD_PARAMS") == "true"
    if given.get("ACCELERATE_USE_DEEPSPEED") == "true":
        file = given.get(f"{_ZERO}CONFIG_FILE", "none")
        zero = _zero_of_variables(given) if file == "none" else _zero_of_file(Path(file))
        shard = str(zero.get("stage")) == "3"
        blocks, optimizer = (
            zero.get(part, {}).get("device") in _HOST_DEVICES
            for part in ("offload_param", "offload_optimizer")
        )
    offload: list[Literal["blocks", "optimizer"]] = ["blocks"] if blocks else []
    offload += ["optimizer"] if optimizer else []
    return LauncherRequest(shard=shard, offload=tuple(offload))


def _zero_of_variables(given: Mapping[str, str]) -> Mapping[str, Any]:
    return {
        "stage": given.get(f"{_ZERO}ZERO_STAGE"),
        "offload_param": {"device": given.get(f"{_ZERO}OFFLOAD_PARAM_DEVICE")},
        "offload_optimizer": {"device": given.get(f"{_ZERO}OFFLOAD_OPTIMIZER_DEVICE")},
    }


def _zero_of_file(file: Path) -> Mapping[str, Any]:
    try:
        zero: dict[str, Any] = parse_json(read_bytes(file))["zero_optimization"]
        parts = [part for name, part in zero.items() if name.startswith("offload_")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("an offload entry is not a table")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"DeepSpeed's '{file}' cannot be read ({error}). Correct its zero_optimization, or "
            "launch without it and set memory.shard and memory.offload."
        ) from error
    return zero


_SCHEME = "dpo-video"
_POLL = 0.01  # seconds


def rendezvous_url() -> str | None:
    """The `init_method` of `init_process_group`; None where torch's default is safe.

    A restarting launcher keeps one store for all attempts, so a process could read an address that
    an earlier attempt has left there.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"{_SCHEME}://" if shared else None


def attempt_store(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The part of a store that belongs to the processes of this attempt.

    Every process requests it under a name that was never used before, so no answer is stale. Rank 0
    may see a stale request; it answers until every rank has acknowledged this attempt.

    Raises:
        TimeoutError: if a process is still missing.
    """
    if rank:
        request = uuid.uuid4().hex
        store.set(f"request/{rank}", request)
        store.wait([f"answer/{request}"], timeout)
        name = store.get(f"answer/{request}").decode()
        store.set(f"acknowledged/{name}/{rank}", "")
        return PrefixStore(name, store)
    name, missing = uuid.uuid4().hex, set(range(1, world_size))
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(f"Processes {sorted(missing)} of {world_size} have not connected.")
        for other in sorted(missing):
            if store.check([f"acknowledged/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"request/{other}"]):
                store.set(f"answer/{store.get(f'request/{other}').decode()}", name)
        time.sleep(_POLL)
    return PrefixStore(name, store)


def _rendezvous(_url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
    )
    yield attempt_store(store, rank, world_size, timeout), rank, world_size


register_rendezvous_handler(_SCHEME, _rendezvous)
