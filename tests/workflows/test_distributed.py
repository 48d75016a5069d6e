"""The rendezvous: processes of one attempt connect, and never read an earlier attempt's keys."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from small_processes import free_port, in_processes
from torch.distributed import HashStore, Store
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous

from dpo_video.workflows.distributed import attempt_store, rendezvous_url

SOON = timedelta(seconds=20)


def attempt(store: Store, world_size: int, *, late: float = 0.0) -> list[bytes]:
    """The value that each process reads from rank 0, which starts `late` seconds later."""
    begin = threading.Barrier(world_size)

    def process(rank: int) -> bytes:
        begin.wait()
        if rank == 0:
            threading.Event().wait(late)
        own = attempt_store(store, rank, world_size, SOON)
        if rank == 0:
            own.set("address", f"of attempt {attempts}")
        own.wait(["address"], SOON)
        return bytes(own.get("address"))

    attempts = store.add("attempts of the test", 1)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(process, range(world_size)))


@pytest.mark.parametrize("late", [0.0, 0.1])
def test_no_attempt_reads_an_earlier_attempts_keys(late: float) -> None:
    store = HashStore()
    for count in (1, 2, 3):
        assert attempt(store, 3, late=late) == [b"of attempt %d" % count] * 3


def test_stale_requests_do_not_disturb_a_later_attempt() -> None:
    store = HashStore()
    with pytest.raises(RuntimeError):  # rank 0 was killed before it answered
        attempt_store(store, 1, 2, timedelta(seconds=0.05))
    assert attempt(store, 2, late=0.1) == [b"of attempt 1"] * 2


def test_a_timeout_names_the_missing_processes() -> None:
    with pytest.raises(TimeoutError, match=r"\[1, 2\] of 3"):
        attempt_store(HashStore(), 0, 3, timedelta(seconds=0.05))


def test_only_a_launchers_store_needs_our_rendezvous(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert rendezvous_url() is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert rendezvous_url() == "dpo-video://"


def leave_a_key(found: Path) -> None:
    """A worker of torch's launcher: fails at first; once restarted, says what it finds."""
    store, _, _ = next(iter(rendezvous("env://")))
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        store.set("left", "by attempt 0")
        raise SystemExit(1)
    found.write_text(str(store.check(["left"])))


def launch_both(ports: Mapping[str, int], folder: Path) -> None:
    for backend, port in ports.items():
        launch(backend, port, folder / backend)


def launch(backend: str, port: int, found: Path) -> None:
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=1, run_id="one", max_restarts=1,
        rdzv_backend=backend, rdzv_endpoint=f"localhost:{port}",
        rdzv_configs={"rank": 0}, start_method="fork", monitor_interval=0.02,
    )  # fmt: skip
    elastic_launch(config, leave_a_key)(found)


def test_torchs_launcher_still_needs_our_rendezvous(tmp_path: Path) -> None:
    ports = {"static": free_port(), "c10d": free_port()}
    assert in_processes(1, launch_both, ports, tmp_path, start="spawn") == [0]
    for backend in ports:
        assert (tmp_path / backend).read_text() == "True", (
            f"This torch keeps attempts apart with the {backend} backend. Once the oldest "
            "supported torch does with both, remove the rendezvous of workflows/distributed.py."
        )
