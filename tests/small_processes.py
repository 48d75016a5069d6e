"""Several processes on this machine without a launcher, forked from one that has imported them.

codes = in_processes(2, work, argument)
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

_IMPORTED = ["small_training", "small_wan", "dpo_video.memory.fsdp"]
_PATIENCE = 300  # seconds


def in_processes(
    count: int,
    work: Callable[..., None],
    *arguments: Any,
    start: Literal["forkserver", "spawn"] = "forkserver",
) -> list[int]:
    """Call a function of a module in every process of a group; return their exit codes.

    Args:
        count: Number of processes.
        work: The function.
        arguments: Its arguments.
        start: "spawn" imports less, for work that needs no model.
    """
    context = processes(start)
    port = free_port()
    started = [
        context.Process(target=_member, args=(rank, count, port, work, arguments))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(_PATIENCE)
        process.kill()
        process.join()
    return [process.exitcode or 0 for process in started]


def processes(start: Literal["forkserver", "spawn"] = "forkserver") -> Any:
    """The context of multiprocessing that starts them."""
    context = multiprocessing.get_context(start)
    context.set_forkserver_preload(_IMPORTED)
    tests = str(Path(__file__).parent)  # the server reads no other path
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    return context


def free_port() -> int:
    with socket.socket() as unbound:
        unbound.bind(("localhost", 0))
        return int(unbound.getsockname()[1])


def _member(
    rank: int, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """What torch's launcher sets for each process."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip
    work(*arguments)
