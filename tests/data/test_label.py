"""Labelling a stored set: every pair once across interruptions, and the labels in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import SHAPE
from small_labels import COUNT, Brighter, random_store
from torch import Tensor

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.label import LabelSummary, StoreTask, label, recipe, summarize
from dpo_video.data.labels import LabelSet, preferences
from dpo_video.data.store import PairStore
from dpo_video.errors import PluginError, StoreError
from dpo_video.strategies import LabelResult, LabelTask, ReasonedLabeler, StoreLabeler

SECONDS = 2 / SHAPE.fps  # two frames a segment, so two segments


class Reasoned(ReasonedLabeler):
    """The same labels with reasons."""

    def judge(
        self, prompts: Sequence[str], first: Tensor, second: Tensor, segments: Sequence[slice]
    ) -> LabelResult:
        labels = Brighter()(prompts, first, second, segments)
        return LabelResult(labels=labels, notes=[f"of {prompts[0]}"], figures={"requests": 2})


class Everything(StoreLabeler):
    """Labels ties and records its arguments."""

    def label_store(self, work: LabelTask) -> None:
        for pair in work.pairs:
            if pair not in work.labels_by("me"):
                first, second = work.videos(pair)
                assert first.shape == second.shape == (3, SHAPE.frames, SHAPE.height, SHAPE.width)
                work.record(pair, [0.0] * len(work.segments), rater="me", note=work.prompt(pair))


@pytest.fixture
def store(small_model: AnimateDiffModel, tmp_path: Path) -> PairStore:
    return random_store(tmp_path / "pairs", small_model)


def open_label_set(store: PairStore, model: AnimateDiffModel, name: str = "mine") -> LabelSet:
    made = recipe(store, model, {"name": name}, SECONDS)
    return LabelSet.open_or_create(store.folder, name, made)


def test_every_pair_is_labelled_on_its_decoded_videos(
    store: PairStore, small_model: AnimateDiffModel
) -> None:
    label_set = open_label_set(store, small_model)
    reports = list(label(store, small_model, Brighter(), label_set))
    assert [report.done for report in reports] == [1, 2, 3]
    assert {report.total for report in reports} == {3}
    batch = store.batch(range(COUNT))
    first, second = (small_model.decode_videos(part) for part in (batch.first, batch.second))
    expected = Brighter()(["a"] * COUNT, first, second, [slice(0, 2), slice(2, 4)])
    assert torch.equal(torch.stack(list(label_set.tensors().values())), expected)
    assert [list(report.labels) for report in reports] == expected.tolist()
    assert label_set.recipe.segments == ((0, 2), (2, 4)) == label_set.recipe.latents


def test_labelling_resumes_after_an_interruption(
    store: PairStore, small_model: AnimateDiffModel
) -> None:
    stopped = label(store, small_model, Brighter(), open_label_set(store, small_model, "cut"))
    next(stopped)
    stopped.close()
    again = open_label_set(store, small_model, "cut")
    assert [report.pair for report in label(store, small_model, Brighter(), again)] == [1, 2]
    whole = open_label_set(store, small_model, "whole")
    list(label(store, small_model, Brighter(), whole))
    assert whole.path.read_bytes() == again.path.read_bytes()
    assert list(label(store, small_model, Brighter(), whole)) == []


def test_later_pairs_are_labelled_by_a_later_call(
    store: PairStore, small_model: AnimateDiffModel
) -> None:
    list(label(store, small_model, Brighter(), open_label_set(store, small_model)))
    longer = random_store(store.folder, small_model, COUNT + 2)
    reports = label(longer, small_model, Brighter(), open_label_set(longer, small_model))
    assert [(report.pair, report.done) for report in reports] == [(3, 4), (4, 5)]


def test_reasons_are_kept_and_figures_reported(
    store: PairStore, small_model: AnimateDiffModel
) -> None:
    label_set = open_label_set(store, small_model)
    reports = list(label(store, small_model, Reasoned(), label_set))
    assert [line.note for line in label_set.lines] == [f"of prompt {i}" for i in range(COUNT)]
    assert [report.figures for report in reports] == [{"requests": 2}] * COUNT


def test_a_store_labeler_labels_the_store_itself(
    store: PairStore, small_model: AnimateDiffModel
) -> None:
    label_set = open_label_set(store, small_model)
    assert list(label(store, small_model, Everything(), label_set)) == []
    again = LabelSet(store.folder, "mine")
    assert again.raters == ["me"] == list(StoreTask(store, small_model, again, Everything()).raters)
    assert {line.note for line in again.lines} == {f"prompt {i}" for i in range(COUNT)}
    assert all(line.time is not None for line in again.lines)
    list(label(store, small_model, Everything(), again))
    assert len(again.lines) == COUNT


@pytest.mark.parametrize(
    ("pair", "labels", "sentence"),
    [
        (9, [0.0, 0.0], "the pair 9, of 3 pairs"),
        (0, [0.0], "1 labels for 2 segments"),
        (0, [0.0, 2.0], "the label 2.0, which is no number in"),
        (0, [0.0, float("nan")], "the label nan, which"),
    ],
)
def test_a_store_labeler_that_records_something_else_is_named(
    store: PairStore,
    small_model: AnimateDiffModel,
    pair: int,
    labels: list[float],
    sentence: str,
) -> None:
    class Wrong(StoreLabeler):
        def label_store(self, work: LabelTask) -> None:
            work.record(pair, labels)

    label_set = open_label_set(store, small_model)
    with pytest.raises(PluginError, match=rf"^The labeler Wrong of \S+ records .*{sentence}"):
        list(label(store, small_model, Wrong(), label_set))
    assert not LabelSet(store.folder, "mine").lines


def test_pairs_of_another_model_are_refused(
    store: PairStore, small_model: AnimateDiffModel
) -> None:
    label_set = open_label_set(store, small_model)
    small_model.identity = "another"
    with pytest.raises(StoreError, match="made with other weights"):
        next(label(store, small_model, Brighter(), label_set))


def test_a_summary_shows_itself(store: PairStore, small_model: AnimateDiffModel) -> None:
    label_set = open_label_set(store, small_model)
    label_set.record(0, [1, 0], rater="ann")
    label_set.record(0, [1, -1], rater="bob")
    label_set.record(1, ["skip", -1], rater="ann")
    summary = summarize(store, label_set, {"requests": 4})
    assert [(each.first, each.second, each.tie) for each in summary.segments] == [
        (0.5, 0, 0.5),
        (0, 1, 0),
    ]
    assert summary.summary == f"2 of 3 pairs have labels: {label_set.path}"
    assert summary.details() == [
        "Agreement of ann and bob: 50% of 2 common segments, Cohen's kappa 0.33",
        "requests: 4",
    ]
    assert summary.table().row_count == 2
    assert "<td>0-1</td><td>50%</td>" in summary._repr_html_()
    assert LabelSummary.model_validate(summary.to_dict()) == summary


# --- what training sees ----------------------------------------------------------------------


def test_labels_replace_preferences(store: PairStore, small_model: AnimateDiffModel) -> None:
    label_set = open_label_set(store, small_model)
    label_set.record(0, [1, -0.5])
    label_set.record(2, [0, 0])
    view = store.relabelled(preferences([label_set], frames=4))
    assert view.batch([0, 1, 2]).preference.tolist() == [[1, 1, -0.5, -0.5], [0] * 4, [0] * 4]
    assert view.decided() == [0], "unlabelled pairs and ties train nothing"
    assert store.batch([0, 1, 2]).preference.eq(1).all() and store.decided() == [0, 1, 2]
    for part in ("first", "second", "region", "strength"):
        both = (getattr(each.batch([0, 1, 2]), part) for each in (store, view))
        assert torch.equal(*both), part


def test_several_label_sets_vote_per_latent_frame(
    store: PairStore, small_model: AnimateDiffModel
) -> None:
    """The third one's only segment covers all frames."""
    label_sets = [open_label_set(store, small_model, name) for name in ("a", "b")]
    whole = recipe(store, small_model, {"name": "c"}, seconds=1.0)
    label_sets.append(LabelSet.open_or_create(store.folder, "c", whole))
    label_sets[0].record(0, [1, 1])
    label_sets[1].record(0, [-1, 0.5])
    label_sets[2].record(0, [-0.2])
    label_sets[1].record(1, [-0.5, "skip"])
    found = {pair: value.tolist() for pair, value in preferences(label_sets, frames=4).items()}
    assert found == {0: [-1, -1, 1, 1], 1: [-1, -1, 0, 0]}
    flipped = preferences(label_sets[::-1], frames=4)
    assert {pair: value.tolist() for pair, value in flipped.items()} == found
    assert preferences(label_sets[:1], frames=4)[0].tolist() == [1, 1, 1, 1]
    assert preferences(label_sets[1:2], frames=4)[1].tolist() == [-0.5, -0.5, 0, 0]
