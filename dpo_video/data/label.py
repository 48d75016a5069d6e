"""A stored set and a labeler to a book of labels."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, final

import torch

from dpo_video.data.labels import LabelRecipe, LabelSet
from dpo_video.data.segments import SECONDS, sound_labels, split
from dpo_video.data.store import PairStore
from dpo_video.strategies import (
    Labeler,
    LabelResult,
    LabelTask,
    ReasonedLabeler,
    StoreLabeler,
    VideoModel,
)
from dpo_video.types import SegmentLabel, Video


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """One pair was labelled."""

    done: int
    """Pairs of the set that have a label."""
    total: int
    pair: int
    labels: Sequence[float]
    seconds: float
    figures: Mapping[str, float]
    """What it took; see `Judgement`."""


@final
class StoreTask(LabelTask):
    """A pair store and a book, for a labeler that goes through them by itself."""

    def __init__(self, store: PairStore, model: VideoModel, book: LabelSet) -> None:
        self.store, self.model, self.book = store, model, book
        self.pairs = range(len(store))
        self.segments = [slice(start, stop) for start, stop in book.recipe.segments]
        self.fps = book.recipe.fps

    def prompt(self, pair: int) -> str:
        """As it is in the store."""
        return self.store.rows[pair].prompt

    def videos(self, pair: int) -> tuple[Video, Video]:
        """Decoded by the model that the pairs were made with."""
        batch = self.store.batch([pair])
        both = torch.cat([batch.first, batch.second]).to(self.model.device)
        first, second = self.model.decode_videos(both).float().cpu()
        return first, second

    @property
    def raters(self) -> Sequence[str]:
        """Those in the book."""
        return self.book.raters

    def labels_by(self, rater: str = "") -> Mapping[int, Sequence[SegmentLabel]]:
        """What the book says."""
        return self.book.labels_by(rater)

    def record(
        self, pair: int, marks: Sequence[SegmentLabel], *, rater: str = "", note: str = ""
    ) -> None:
        """A line in the book, with the time."""
        now = datetime.now(UTC).replace(microsecond=0)
        self.book.record(pair, marks, rater=rater, note=note, time=now)


def recipe(
    store: PairStore, model: VideoModel, labeler: Mapping[str, Any], seconds: float = SECONDS
) -> LabelRecipe:
    """What the labels of a labeler on a store have in common.

    Args:
        store: the pairs.
        model: what decodes them.
        labeler: the table [labeler], without its incidental options.
        seconds: length of a segment.
    """
    segments = split(model.shape, seconds)
    latents = [model.latent_frames(segment) for segment in segments]
    return LabelRecipe(
        labeler=dict(labeler),
        pairs=store.manifest.key,
        identity=model.identity,
        fps=model.shape.fps,
        segments=tuple((part.start, part.stop) for part in segments),
        latents=tuple((part.start, part.stop) for part in latents),
    )


def label(
    store: PairStore, model: VideoModel, labeler: Labeler | StoreLabeler, book: LabelSet
) -> Iterator[LabelReport]:
    """Label the pairs that have no label yet, one report a pair.

    A `StoreLabeler` goes through the set by itself and reports nothing.
    """
    store.check_fits(model)
    work = StoreTask(store, model, book)
    if isinstance(labeler, StoreLabeler):
        labeler.label_store(work)
        return
    done = book.done()
    for pair in work.pairs:
        if pair in done:
            continue
        started = time.monotonic()
        judgement = _judge(labeler, work, pair)
        labels = sound_labels(labeler, judgement.labels, len(work.segments))[0].tolist()
        book.record(pair, labels, note=judgement.notes[0])
        done.add(pair)
        yield LabelReport(
            done=len(done),
            total=len(store),
            pair=pair,
            labels=labels,
            seconds=time.monotonic() - started,
            figures=judgement.figures,
        )


def _judge(labeler: Labeler, work: StoreTask, pair: int) -> LabelResult:
    first, second = work.videos(pair)
    asked = [work.prompt(pair)], first[None], second[None], work.segments
    if isinstance(labeler, ReasonedLabeler):
        return labeler.judge(*asked)
    return LabelResult(labels=labeler(*asked), notes=[""], figures={})
