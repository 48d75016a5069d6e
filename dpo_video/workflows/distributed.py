"""Several processes: how many there are, and how they meet."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined] # public by its documentation
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler

from dpo_video.data.build import Worker


def process_count() -> int:
    """Number of processes that the launcher started for this run."""
    world = os.environ.get("WORLD_SIZE", "1")
    return int(world) if world.isdecimal() else 1


def is_main_process() -> bool:
    """Whether this is the process that writes, before the processes have met."""
    rank = os.environ.get("RANK", "0")
    return not (rank.isdecimal() and 0 < int(rank) < process_count())


def launched_worker() -> Worker:
    """This process's part of work that a launcher's processes share without meeting."""
    rank, world = os.environ.get("RANK", "0"), process_count()
    known = rank.isdecimal() and int(rank) < world
    return Worker(number=int(rank), count=world) if known else Worker()


_SCHEME = "dpo-video"
_POLL = 0.01  # seconds


def rendezvous_url() -> str | None:
    """The `init_method` of `init_process_group`; None where torch's default is safe.

    A workaround: torch's launcher keeps one store for all attempts, so a restarted process may read
    an address that an earlier attempt has left there (https://github.com/pytorch/pytorch/issues/
    135712 and 167288). TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, set before the launcher starts, avoids
    it for the c10d backend only. tests/workflows/test_distributed.py tells when torch no longer
    needs this module's rendezvous.
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
