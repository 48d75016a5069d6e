"""Lines in any order are the same pairs."""

from __future__ import annotations

import gc
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as draw
from pydantic import ValidationError

from dpo_video.data.pair_index import PairIndex, PairRecord, checked, parse
from dpo_video.errors import StoreError


def row(index: int, **changes: object) -> PairRecord:
    fields = {"index": index, "prompt": f"a {index}", "context": "0" * 16, "source": "clip",
              "strength": 0.5, "region_share": 1 / 3, "preference": (1.0, -0.25)}  # fmt: skip
    return checked(**{**fields, **changes})


def index_of(found: list[PairRecord]) -> PairIndex:
    rows = PairIndex()
    rows.add(found, "pairs.jsonl")
    return rows


@given(
    indices=draw.lists(draw.integers(0, 30), max_size=40), seed=draw.integers(), cut=draw.integers()
)
def test_ready_pairs_depend_on_neither_order_nor_repetition(
    indices: list[int], seed: int, cut: int
) -> None:
    rows = index_of([row(i) for i in indices])
    hole = next(i for i in range(32) if i not in indices)
    assert [each.index for each in rows.ready] == list(range(hole))
    assert len(rows) == len(set(indices))
    assert all((i in rows) == (i in indices) for i in range(32))
    shuffled = list(indices)
    Random(seed).shuffle(shuffled)
    other, at = PairIndex(), cut % (len(indices) + 1)
    for part in (shuffled[:at], shuffled[at:]):  # read in two goes
        other.add([row(i) for i in part], "pairs.jsonl")
    assert (other.ready, other.waiting) == (rows.ready, rows.waiting)
    assert other.lines == len(indices)


@pytest.mark.parametrize("order", [[0, 1], [2, 2]])
def test_different_lines_of_one_pair_are_refused(order: list[int]) -> None:
    lines = [row(i) for i in order]
    with pytest.raises(
        StoreError, match=r"Line 3 of 'pairs.jsonl' differs from an earlier line of pair"
    ):
        index_of([*lines, row(order[1], prompt="another")])


def test_a_line_is_read_back_as_it_was_written() -> None:
    rows = [row(0), row(1, preference=(float("inf"), 0.1))]
    assert parse([each.line() for each in rows], "x") == rows
    with pytest.raises(ValidationError):
        row(3, region_share=float("nan"))


@pytest.mark.parametrize("bad", [b"", b"{}", b"[]", row(1).line() + b"," + row(2).line()])
@pytest.mark.parametrize("at_once", [1, 2, 5000])
def test_an_invalid_line_is_named(
    bad: bytes, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_video.data.pair_index.BLOCK", at_once)
    lines = [row(0).line(), bad, row(3).line()]
    with pytest.raises(StoreError, match=r"Line 12 of 'x' cannot be read .*Delete that line and"):
        parse(lines, "x", before=10)
    assert gc.isenabled()
