"""Where the processes of one attempt meet: apart from what earlier attempts left behind.

torch's launcher keeps one store for all the attempts of a run, and its processes look each other's
addresses up there under the same names every time. After a restart some of them read those of the
dead, and then fail or wait for half an hour (PyTorch's issue 135712 tells it of NCCL; gloo on
torch 2.13 does so too). The launcher's count of restarts cannot tell the attempts apart, for each
node has its own. So rank 0 draws a name for the attempt, and hands it to those who ask for it now.
"""

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
