"""The processes of an attempt meet each other, and not what an earlier one left behind."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store

from dpo_video.workflows import distributed as rendezvous

SOON = timedelta(seconds=20)


def attempt(store: Store, world_size: int, *, late: float = 0.0) -> list[bytes]:
    """What each process of an attempt reads of rank 0, which comes `late` seconds later."""
    begin = threading.Barrier(world_size)

    def process(rank: int) -> bytes:
        begin.wait()
        if rank == 0:
            threading.Event().wait(late)
        place = rendezvous.apart(store, rank, world_size, SOON)
        if rank == 0:
            place.set("address", f"of attempt {attempts}")
        place.wait(["address"], SOON)
        return bytes(place.get("address"))

    attempts = store.add("attempts of the test", 1)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(process, range(world_size)))


@pytest.mark.parametrize("late", [0.0, 0.1])
def test_no_attempt_reads_what_an_earlier_one_wrote(late: float) -> None:
    store = HashStore()
    for count in (1, 2, 3):
        assert attempt(store, 3, late=late) == [b"of attempt %d" % count] * 3


def test_the_questions_of_the_dead_are_not_taken_for_those_of_the_living() -> None:
    store = HashStore()
    with pytest.raises(RuntimeError):  # rank 0 was killed before it answered
        rendezvous.apart(store, 1, 2, timedelta(seconds=0.05))
    assert attempt(store, 2, late=0.1) == [b"of attempt 1"] * 2


def test_it_says_who_has_not_come() -> None:
    with pytest.raises(TimeoutError, match=r"\[1, 2\] of 3"):
        rendezvous.apart(HashStore(), 0, 3, timedelta(seconds=0.05))


def test_without_a_launchers_store_torch_meets_in_its_own_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert rendezvous.url() is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert rendezvous.url() == "dpo-video://"
