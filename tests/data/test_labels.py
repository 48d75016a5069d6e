"""Labels are appended, never overwritten, and survive any interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from small_files import largest_file

from dpo_video.data.labels import (
    Agreement,
    LabelRecipe,
    LabelSet,
    agreement,
    fingerprint,
    names,
    open_label_sets,
    vote,
)
from dpo_video.errors import StoreError, UserError
from dpo_video.types import SegmentLabel

RECIPE = LabelRecipe(
    labeler={"name": "metric", "margin": 0.1},
    pairs="0123456789",
    identity="0123",
    fps=8.0,
    segments=((0, 8), (8, 16)),
    latents=((0, 2), (2, 4)),
)


@pytest.fixture
def label_set(tmp_path: Path) -> LabelSet:
    return LabelSet.open_or_create(tmp_path, "mine", RECIPE)


def labels_of(label_set: LabelSet) -> dict[int, list[float]]:
    return {pair: value.tolist() for pair, value in label_set.tensors().items()}


# --- what is recorded ------------------------------------------------------------------------


def test_what_is_recorded_is_read_back(label_set: LabelSet, tmp_path: Path) -> None:
    label_set.record(3, [1, -0.5], note="sharper")
    label_set.record(0, [0, 0])
    again = LabelSet(tmp_path, "mine")
    assert again.lines == label_set.lines and again.recipe == RECIPE
    assert labels_of(again) == {0: [0, 0], 3: [1, -0.5]}
    assert again.lines[0].note == "sharper" and again.raters == [""]
    assert names(tmp_path) == ["mine"]


def test_the_last_line_counts_and_the_others_are_kept(label_set: LabelSet, tmp_path: Path) -> None:
    label_set.record(0, [1, 1])
    before = label_set.path.read_bytes()
    label_set.record(0, [-1, 1])
    assert label_set.path.read_bytes().startswith(before)
    assert labels_of(LabelSet(tmp_path, "mine")) == {0: [-1, 1]}


def test_a_label_is_on_the_disk_when_record_returns(tmp_path: Path) -> None:
    """The process is killed without closing the file, so nothing may be left in a buffer."""
    program = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        from dpo_video.data.labels import LabelSet, LabelRecipe
        recipe = LabelRecipe.model_validate_json({RECIPE.model_dump_json()!r})
        label_set = LabelSet.open_or_create(Path(sys.argv[1]), "mine", recipe)
        label_set.record(7, [1, "skip"])
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert LabelSet(tmp_path, "mine").labels_by() == {7: (1.0, "skip")}


@pytest.mark.parametrize(
    ("pair", "labels"),
    [(0, [1.0]), (0, [1.0, 1.0, 1.0]), (0, [1.0, 1.5]), (0, [1.0, float("nan")]), (-1, [1.0, 1.0])],
)
def test_an_invalid_label_is_refused(
    label_set: LabelSet, pair: int, labels: list[SegmentLabel]
) -> None:
    with pytest.raises(ValueError):
        label_set.record(pair, labels)
    assert not label_set.path.exists() and label_set.lines == []


def test_undoing_a_label_appends_a_line(label_set: LabelSet) -> None:
    label_set.record(0, [1, 1])
    label_set.record(0, [None, None])
    assert label_set.done() == set() and label_set.tensors() == {}
    assert len(label_set.lines) == 2


def test_a_pair_counts_once_it_is_finished(label_set: LabelSet) -> None:
    label_set.record(0, [1, None], rater="ann")
    assert label_set.tensors() == {} and label_set.done("ann") == set()
    assert label_set.labels_by("ann") == {0: (1.0, None)}
    label_set.record(0, [1, "skip"], rater="ann")
    assert label_set.done("ann") == {0} and label_set.done("bob") == set()
    assert labels_of(label_set) == {0: [1, 0]}
    label_set.record(1, ["skip", "skip"], rater="ann")
    assert label_set.done("ann") == {0, 1}
    assert labels_of(label_set) == {0: [1, 0]}, "pair 1 has nothing but skips"


# --- several raters --------------------------------------------------------------------------


def test_raters_do_not_supersede_each_other(label_set: LabelSet) -> None:
    label_set.record(0, [1, 0.5], rater="ann")
    label_set.record(0, [-1, 1], rater="bob")
    assert labels_of(label_set) == {0: [0, 1]}
    label_set.record(0, [1, 1], rater="cy")
    assert labels_of(label_set) == {0: [1, 1]}
    label_set.record(0, ["skip", -1], rater="bob")
    assert labels_of(label_set) == {0: [1, 1]}
    assert label_set.raters == ["ann", "bob", "cy"]


def test_one_rater_keeps_the_strength_of_a_label(label_set: LabelSet) -> None:
    label_set.record(0, [0.25, -0.5])
    assert labels_of(label_set) == {0: [0.25, -0.5]}


LABELS: st.SearchStrategy[SegmentLabel] = st.one_of(
    st.floats(-1, 1, allow_nan=False), st.just("skip"), st.integers(-1, 1).map(float)
)
VOTES = st.integers(1, 4).flatmap(
    lambda size: st.lists(st.lists(LABELS, min_size=size, max_size=size), min_size=1, max_size=5)
)


def negated(labels: Sequence[SegmentLabel]) -> list[SegmentLabel]:
    return [-label if isinstance(label, float) else label for label in labels]


@given(votes=VOTES, order=st.randoms())
def test_a_vote_depends_on_neither_order_nor_side(
    votes: list[list[SegmentLabel]], order: object
) -> None:
    shuffled = list(votes)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert vote(shuffled) == vote(votes)
    assert list(vote([negated(labels) for labels in votes])) == negated(vote(votes))


# --- agreement -------------------------------------------------------------------------------


def test_agreement_counts_the_segments_that_both_labelled() -> None:
    """Signs (1, 1), (1, 0), (-1, -1), (0, 0): 3 of 4; chance (2*1 + 1*2 + 1*1) / 16 = 5/16."""
    first: dict[int, Sequence[SegmentLabel]] = {
        0: [1.0, 0.5],
        1: [-1.0, "skip"],
        2: [0.0, 1.0],
        3: [1.0],
    }
    second: dict[int, Sequence[SegmentLabel]] = {
        0: [0.1, 0.0],
        1: [-1.0, 1.0],
        2: [0.0, None],
        9: [1.0],
    }
    found = agreement(first, second)
    assert found.segments == 4 and found.share == 0.75
    assert found.kappa == pytest.approx((3 / 4 - 5 / 16) / (1 - 5 / 16))
    assert agreement(second, first) == found
    assert agreement(first, {}) == Agreement(segments=0, share=None, kappa=None)


# --- the same recipe -------------------------------------------------------------------------


def test_the_same_recipe_resumes(label_set: LabelSet, tmp_path: Path) -> None:
    label_set.record(0, [1, 1])
    again = LabelSet.open_or_create(tmp_path, "mine", RECIPE.model_copy())
    again.record(1, [0, 0])
    assert LabelSet(tmp_path, "mine").done() == {0, 1}


@pytest.mark.parametrize(
    "change",
    [
        {"labeler": {"name": "metric"}},
        {"pairs": "other"},
        {"identity": "4567"},
        {"segments": ((0, 4), (4, 16))},
    ],
)
def test_another_recipe_needs_another_name(
    label_set: LabelSet, tmp_path: Path, change: dict[str, object]
) -> None:
    label_set.record(0, [1, 1])
    other = RECIPE.model_copy(update=change)
    with pytest.raises(UserError, match=r"labels that were given with other options.*--as NAME"):
        LabelSet.open_or_create(tmp_path, "mine", other)
    LabelSet.open_or_create(tmp_path, "other", other).record(0, [1] * len(other.segments))
    assert names(tmp_path) == ["mine", "other"]


def test_a_set_without_labels_is_none(label_set: LabelSet, tmp_path: Path) -> None:
    assert names(tmp_path) == []
    with pytest.raises(UserError, match=r"The labels 'mine' in .* are empty\. Label the pairs"):
        open_label_sets(tmp_path, ["mine"])
    label_set.record(0, [1, 1])
    assert names(tmp_path) == ["mine"] and open_label_sets(tmp_path, ["mine"])
    assert labels_of(LabelSet(tmp_path, "mine")) == {0: [1, 1]}


def test_a_set_without_labels_may_change_its_recipe(label_set: LabelSet, tmp_path: Path) -> None:
    other = RECIPE.model_copy(update={"labeler": {"name": "metric", "margin": 0.2}})
    assert LabelSet.open_or_create(tmp_path, "mine", other).recipe == other
    assert LabelSet(tmp_path, "mine").recipe == other


@pytest.mark.parametrize("name", ["", "../store", "a/b", ".hidden", "a b"])
def test_a_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name labels"):
        LabelSet.open_or_create(tmp_path, name, RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_suggests_the_nearest(label_set: LabelSet, tmp_path: Path) -> None:
    label_set.record(0, [1, 1])
    with pytest.raises(UserError, match=r"Unknown set of labels.*Did you mean 'mine'\?"):
        LabelSet(tmp_path, "mime")


def test_a_fingerprint_depends_on_the_labels_alone(label_set: LabelSet, tmp_path: Path) -> None:
    label_set.record(0, [1, 1], note="a")
    label_set.record(1, [0, 1])
    other = LabelSet.open_or_create(tmp_path, "other", RECIPE)
    other.record(1, [0, 1], rater="bob")
    other.record(0, [0, 0], rater="bob")
    assert fingerprint(other.tensors()) != fingerprint(label_set.tensors())
    other.record(0, [1, 1], rater="bob")
    assert fingerprint(other.tensors()) == fingerprint(label_set.tensors())
    assert fingerprint({0: torch.ones(1)}) != fingerprint({1: torch.ones(1)})


# --- damage ----------------------------------------------------------------------------------


def test_a_torn_last_line_is_ignored(label_set: LabelSet, tmp_path: Path) -> None:
    label_set.record(0, [1, 1])
    label_set.record(1, [1, 1])
    complete = label_set.path.read_bytes()
    for cut in range(1, 12):
        label_set.path.write_bytes(complete[:-cut])
        reader = LabelSet(tmp_path, "mine")
        assert reader.done() == {0}
        assert label_set.path.read_bytes() == complete[:-cut], "a reader must not touch the file"
        LabelSet.open_or_create(tmp_path, "mine", RECIPE).record(1, [1, 1])
        assert label_set.path.read_bytes() == complete


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (b"{}", "Line 2 of '.*' cannot be read .pair: it is missing"),
        (b"\xff", "Line 2 of '.*' cannot be read"),
        (b'{"pair": 0, "labels": [1]}', "Line 2 of '.*' has 1 label for 2 segments"),
        (b'{"pair": 0, "labels": [1, 2]}', "Line 2 of '.*' cannot be read"),
    ],
)
def test_a_damaged_line_is_named(
    label_set: LabelSet, tmp_path: Path, damage: bytes, sentence: str
) -> None:
    label_set.record(0, [1, 1])
    label_set.path.write_bytes(label_set.path.read_bytes() + damage + b"\n")
    with pytest.raises(StoreError, match=sentence) as caught:
        LabelSet(tmp_path, "mine")
    assert "\n" not in str(caught.value)


def test_a_damaged_recipe_is_reported(label_set: LabelSet, tmp_path: Path) -> None:
    recipe = label_set.path.with_suffix(".json")
    recipe.write_text(json.dumps({"format": "something else"}))
    with pytest.raises(StoreError, match="cannot be read"):
        LabelSet(tmp_path, "mine")


def test_a_full_disk_loses_nothing(label_set: LabelSet, tmp_path: Path) -> None:
    label_set.record(0, [1, 1])
    with (
        largest_file(label_set.path.stat().st_size + 10),
        pytest.raises(UserError, match="exceed the size limit"),
    ):
        label_set.record(1, [1, 1])
    assert label_set.done() == LabelSet(tmp_path, "mine").done() == {0}
    label_set.record(1, [-1, 1])
    assert labels_of(LabelSet(tmp_path, "mine")) == {0: [1, 1], 1: [-1, 1]}


def test_a_recipe_refuses_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        LabelRecipe.model_validate({**RECIPE.model_dump(), "extra": 1})
