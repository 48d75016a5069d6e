"""Label a stored pair set with a labeler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from typing import Any, final

import torch
from rich.table import Table

from dpo_video.data.labels import Agreement, LabelRecipe, LabelSet, agreement, names
from dpo_video.data.segments import SECONDS, check_labels, latent_parts, split
from dpo_video.data.store import PairStore
from dpo_video.registry.returned import decoded, wrong
from dpo_video.strategies import (
    AnyLabeler,
    Labeler,
    LabelResult,
    LabelTask,
    ReasonedLabeler,
    StoreLabeler,
    VideoModel,
)
from dpo_video.support.formatting import html_table, plain_table
from dpo_video.support.statistics import Record
from dpo_video.types import SegmentLabel, Video


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """Progress: a pair was labelled."""

    done: int
    """Pairs of the store that have a label."""
    total: int
    pair: int
    labels: Sequence[float]
    figures: Mapping[str, float]
    """Costs by name; see `LabelResult`."""


@final
class StoreTask(LabelTask):
    """A pair store and a label set, for a `StoreLabeler`."""

    def __init__(
        self,
        store: PairStore,
        model: VideoModel,
        label_set: LabelSet,
        labeler: AnyLabeler,
        on_remark: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._labeler, self._on_remark = labeler, on_remark
        self.store, self.model, self.label_set = store, model, label_set
        self.pairs = range(len(store))
        self.segments = [slice(start, stop) for start, stop in label_set.recipe.segments]
        self.fps = label_set.recipe.fps

    def prompt(self, pair: int) -> str:
        """The prompt in the store."""
        return self.store.records[pair].prompt

    def videos(self, pair: int) -> tuple[Video, Video]:
        """Both videos, decoded by the model that the pairs were made with."""
        batch = self.store.batch([pair])
        both = torch.cat([batch.first, batch.second]).to(self.model.device)
        first, second = decoded(self.model, both).float().cpu()
        return first, second

    @property
    def raters(self) -> Sequence[str]:
        """The raters of the label set."""
        return self.label_set.raters

    def labels_by(self, rater: str = "") -> Mapping[int, Sequence[SegmentLabel]]:
        """A rater's labels in the label set."""
        return self.label_set.labels_by(rater)

    def record(
        self, pair: int, labels: Sequence[SegmentLabel], *, rater: str = "", note: str = ""
    ) -> None:
        """Append a line with the current time to the label set.

        Raises:
            PluginError: for a pair that does not exist, or labels that are none.
        """
        if fault := self._fault(pair, labels, rater, note):
            raise wrong(self._labeler, f"records {fault}")
        now = datetime.now(UTC).replace(microsecond=0)
        self.label_set.record(pair, labels, rater=rater, note=note, time=now)

    def _fault(self, pair: object, labels: object, rater: object, note: object) -> str:
        """What is wrong with a record, as the end of a sentence; "" if nothing is."""
        if type(pair) is not int or pair not in self.pairs:
            return f"labels of the pair {pair!r}, of {len(self.pairs)} pairs"
        if not isinstance(labels, Sequence) or isinstance(labels, str):
            return f"a {type(labels).__name__} as the labels of a pair, not a sequence"
        if len(labels) != len(self.segments):
            return f"{len(labels)} labels for {len(self.segments)} segments"
        for label in labels:
            number = isinstance(label, int | float) and not isinstance(label, bool)
            if not (label is None or label == "skip" or (number and -1 <= label <= 1)):
                return f"the label {label!r}, which is no number in [-1, 1], 'skip' or None"
        if not (isinstance(rater, str) and isinstance(note, str)):
            return "a rater or a note that is no text"
        return ""

    def remark(self, text: str) -> None:
        """Pass it on."""
        self._on_remark(text)


def recipe(
    store: PairStore, model: VideoModel, labeler: Mapping[str, Any], seconds: float = SECONDS
) -> LabelRecipe:
    """The recipe of labels on a store; `labeler` is its table without the incidental options."""
    segments = split(model.shape, seconds)
    latents = latent_parts(model, segments)
    return LabelRecipe(
        labeler=dict(labeler),
        pairs=store.manifest.key,
        identity=model.identity,
        fps=model.shape.fps,
        segments=tuple((part.start, part.stop) for part in segments),
        latents=tuple((part.start, part.stop) for part in latents),
    )


def label(
    store: PairStore,
    model: VideoModel,
    labeler: Labeler | StoreLabeler,
    label_set: LabelSet,
    on_remark: Callable[[str], None] = lambda text: None,
) -> Iterator[LabelReport]:
    """Label the pairs that have no label yet, one report per pair.

    A `StoreLabeler` labels the store by itself and yields no report; what it has to say about the
    labels goes to `on_remark`.
    """
    store.check_fits(model)
    task = StoreTask(store, model, label_set, labeler, on_remark)
    if isinstance(labeler, StoreLabeler):
        labeler.label_store(task)
        return
    done = label_set.done()
    for pair in task.pairs:
        if pair in done:
            continue
        result = _judge(labeler, task, pair)
        labels = check_labels(labeler, result.labels, len(task.segments))[0].tolist()
        label_set.record(pair, labels, note=result.notes[0])
        done.add(pair)
        yield LabelReport(
            done=len(done), total=len(store), pair=pair, labels=labels, figures=result.figures
        )


def _judge(labeler: Labeler, task: StoreTask, pair: int) -> LabelResult:
    first, second = task.videos(pair)
    arguments = [task.prompt(pair)], first[None], second[None], task.segments
    if isinstance(labeler, ReasonedLabeler):
        result = labeler.judge(*arguments)
        if not isinstance(result, LabelResult):
            raise wrong(labeler, f"returns a {type(result).__name__}, not a LabelResult")
        if len(result.notes) != 1:
            raise wrong(labeler, f"returns {len(result.notes)} notes for one pair")
        return result
    return LabelResult(labels=labeler(*arguments), notes=[""], figures={})


class SegmentShares(Record):
    """Shares of the labelled pairs by their label of one segment."""

    frames: tuple[int, int]
    """First pixel frame of the segment and the frame after its last."""
    first: float
    second: float
    tie: float


class LabelSummary(Record):
    """The labels of a store under one name."""

    name: str
    """Name of the label set."""
    labels: str
    """Path of the label set."""
    pairs: int
    labelled: int
    segments: tuple[SegmentShares, ...]
    agreement: dict[str, Agreement]
    """With the store's other label sets of the same segments, and among the raters."""
    figures: dict[str, float]
    """Costs of the last call by name."""

    @property
    def summary(self) -> str:
        """The counts in one line."""
        return f"{self.labelled} of {self.pairs} pairs have labels: {self.labels}"

    @property
    def all_ties(self) -> bool:
        """Whether every pair is labelled, and every label is a tie."""
        return self.labelled == self.pairs and all(each.tie == 1 for each in self.segments)

    def details(self) -> list[str]:
        """Agreement and costs, a line each."""
        lines = []
        for both, found in self.agreement.items():
            kappa = "undefined" if found.kappa is None else f"{found.kappa:.2f}"
            share = "none" if found.share is None else f"{found.share:.0%}"
            lines.append(f"Agreement of {both}: {share} of {found.segments} common segments, "
                         f"Cohen's kappa {kappa}")  # fmt: skip
        return lines + [f"{name}: {value:.6g}" for name, value in self.figures.items()]

    def table(self) -> Table:
        """One row per segment, for a terminal."""
        return plain_table(*self._cells(), justify="right")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return self.model_dump(mode="json")

    def _repr_html_(self) -> str:
        return html_table(*self._cells(), caption="; ".join([self.summary, *self.details()]))

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        columns = ["frames", "first better", "second better", "tie"]
        rows = [
            [f"{start}-{stop - 1}", *(f"{share:.0%}" for share in (each.first, each.second,
                                                                   each.tie))]
            for each in self.segments
            for start, stop in [each.frames]
        ]  # fmt: skip
        return columns, rows


def summarize(
    store: PairStore, label_set: LabelSet, figures: Mapping[str, float] | None = None
) -> LabelSummary:
    """Summarize a label set of a store; `figures` are the costs to report with it."""
    labels = list(label_set.tensors().values())
    segments = []
    for number, frames in enumerate(label_set.recipe.segments):
        signs = Counter(int(each[number].sign()) for each in labels)
        first, second, tie = (signs[sign] / max(1, len(labels)) for sign in (1, -1, 0))
        segments.append(SegmentShares(frames=frames, first=first, second=second, tie=tie))
    return LabelSummary(
        name=label_set.name,
        labels=str(label_set.path),
        pairs=len(store),
        labelled=len(labels),
        segments=tuple(segments),
        agreement=_agreements(store, label_set),
        figures=dict(figures or {}),
    )


def _agreements(store: PairStore, label_set: LabelSet) -> dict[str, Agreement]:
    found = {}
    for name in names(store.folder):
        other = LabelSet(store.folder, name)
        if name != label_set.name and other.recipe.segments == label_set.recipe.segments:
            both = f"{label_set.name} and {name}"
            found[both] = agreement(label_set.consensus(), other.consensus())
    for one, two in combinations(label_set.raters, 2):
        both = f"{one or 'no name'} and {two or 'no name'}"
        found[both] = agreement(label_set.labels_by(one), label_set.labels_by(two))
    return found
