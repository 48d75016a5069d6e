"""Raters at work on a store: the next pair of each, its sides, and their progress."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final, get_args

from pydantic import BaseModel, ConfigDict

from dpo_video.data.labels import Agreement, agreement
from dpo_video.strategies import LabelTask
from dpo_video.types import SegmentLabel

Side = Literal["left", "right"]
Answer = Literal["left", "right", "tie", "skip"]
AHEAD = 2  # pairs that the page prefetches
IDLE = 60.0  # seconds; longer pauses do not count as work
PACE_AFTER = 3  # pairs needed to compute a pace


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shown(_Message):
    """The current pair as its rater sees it."""

    pair: int
    prompt: str
    answers: tuple[Answer | None, ...]
    """One per segment, for the rater's own sides."""


class View(_Message):
    """The state that the page shows."""

    rater: str
    current: Shown | None
    """None once all pairs are labelled."""
    ahead: tuple[int, ...]
    """The pairs after it."""
    finished: int
    total: int
    pace: float | None
    """Pairs per hour of work, without breaks."""
    revision: int
    """Number of changes, so that a repeated undo request is ignored."""
    undoable: bool


class OtherRater(_Message):
    """Agreement with another rater."""

    rater: str
    agreement: Agreement


class Summary(_Message):
    """A rater's labels of this session and before."""

    rater: str
    finished: int
    total: int
    answers: dict[Answer, int]
    """Segments by answer; left and right show a bias to one side."""
    pace: float | None
    minutes: float
    """Minutes of work in this session."""
    others: tuple[OtherRater, ...]


@dataclass(kw_only=True)
class _Rater:
    """A rater's state in this session, beyond the recorded labels."""

    finished_before: int
    last: float
    """Time of the last request, by the clock."""
    worked: float = 0.0
    """Seconds of work."""
    revision: int = 0
    history: list[tuple[int, tuple[SegmentLabel, ...]]] = field(default_factory=list)
    """Pairs with their labels before each change."""


@final
class LabelSession:
    """The raters of one run of the server.

    All raters label the pairs in the same random order, so whoever stops early has labelled a fair
    sample, and the same pairs as the others. Sides are drawn per rater, because a common bias to
    one side would count as agreement.
    """

    def __init__(
        self, task: LabelTask, seed: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.task = task
        self._seed = seed
        self._clock = clock
        self._order = list(task.pairs)
        random.Random(seed).shuffle(self._order)
        self._raters: dict[str, _Rater] = {}

    def view(self, rater: str) -> View:
        """The state to show to a rater."""
        state = self._state(rater)
        labels = self.task.labels_by(rater)
        open_pairs = [pair for pair in self._order if not _finished(labels.get(pair))]
        current = None
        if open_pairs:
            pair = open_pairs[0]
            answers = tuple(
                self._answer(rater, pair, label) for label in self._segment_labels(labels, pair)
            )
            current = Shown(pair=pair, prompt=self.task.prompt(pair), answers=answers)
        return View(
            rater=rater,
            current=current,
            ahead=tuple(open_pairs[1 : 1 + AHEAD]),
            finished=len(self._order) - len(open_pairs),
            total=len(self._order),
            pace=self._pace(rater),
            revision=state.revision,
            undoable=bool(state.history) or any(_started(line) for line in labels.values()),
        )

    def answer(
        self, rater: str, pair: int, segment: int, answer: Answer, *, rest: bool = False
    ) -> View:
        """Write an answer, for the rater's own sides, to the disk before returning.

        With `rest` it is also given to the pair's other unlabelled segments.

        Raises:
            KeyError: If there is no such pair or segment.
        """
        if pair not in self.task.pairs or not 0 <= segment < len(self.task.segments):
            raise KeyError(f"there is no segment {segment} of a pair {pair}")
        state = self._state(rater)
        before = self._segment_labels(self.task.labels_by(rater), pair)
        label = self._label(rater, pair, answer)
        after = tuple(
            label if number == segment or (rest and old is None) else old
            for number, old in enumerate(before)
        )
        self.task.record(pair, after, rater=rater)
        state.history.append((pair, before))
        self._count_work(state)
        return self.view(rater)

    def undo(self, rater: str, revision: int) -> View:
        """Undo the last change, unless `revision` is out of date.

        Labels of an earlier run of the server are undone in the reverse order of the pairs.
        """
        state = self._state(rater)
        if revision == state.revision and (change := self._last_change(rater)):
            pair, before = change
            self.task.record(pair, before, rater=rater)
            if state.history:
                state.history.pop()
            self._count_work(state)
        return self.view(rater)

    def flipped(self, rater: str, pair: int) -> bool:
        """Whether a rater sees the pair's first video on the right."""
        text = f"{self._seed} {pair} {rater}"
        return hashlib.sha256(text.encode()).digest()[0] % 2 == 1

    def is_first(self, rater: str, pair: int, side: Side) -> bool:
        """Whether a side shows the pair's first video."""
        return (side == "left") != self.flipped(rater, pair)

    def raters(self) -> dict[str, int]:
        """All raters, with the number of pairs that they finished."""
        names = dict.fromkeys([*self.task.raters, *self._raters])
        return {name: self._count_finished(name) for name in names}

    def summary(self, rater: str) -> Summary:
        """A rater's counts, and the agreement with the others."""
        labels = self.task.labels_by(rater)
        counts = Counter(
            self._answer(rater, pair, label) for pair, line in labels.items() for label in line
        )
        others = tuple(
            OtherRater(rater=name, agreement=agreement(labels, self.task.labels_by(name)))
            for name in self.raters()
            if name != rater
        )
        return Summary(
            rater=rater,
            finished=self._count_finished(rater),
            total=len(self._order),
            answers={answer: counts[answer] for answer in get_args(Answer)},
            pace=self._pace(rater),
            minutes=self._raters[rater].worked / 60 if rater in self._raters else 0.0,
            others=tuple(other for other in others if other.agreement.segments),
        )

    def present(self) -> list[str]:
        """The raters of this run."""
        return list(self._raters)

    def _state(self, rater: str) -> _Rater:
        if rater not in self._raters:
            self._raters[rater] = _Rater(
                finished_before=self._count_finished(rater), last=self._clock()
            )
        return self._raters[rater]

    def _count_work(self, state: _Rater) -> None:
        now = self._clock()
        state.worked += min(now - state.last, IDLE)
        state.last = now
        state.revision += 1

    def _pace(self, rater: str) -> float | None:
        state = self._raters.get(rater)
        if state is None:
            return None
        finished = self._count_finished(rater) - state.finished_before
        if finished < PACE_AFTER or state.worked <= 0:
            return None
        return finished / state.worked * 3600

    def _count_finished(self, rater: str) -> int:
        labels = self.task.labels_by(rater)
        return sum(_finished(labels.get(pair)) for pair in self._order)

    def _last_change(self, rater: str) -> tuple[int, tuple[SegmentLabel, ...]] | None:
        history = self._state(rater).history
        if history:
            return history[-1]
        labels = self.task.labels_by(rater)
        for pair in reversed(self._order):
            line = self._segment_labels(labels, pair)
            given = [number for number, label in enumerate(line) if label is not None]
            if given:
                return pair, (*line[: given[-1]], None, *line[given[-1] + 1 :])
        return None

    def _segment_labels(
        self, labels: Mapping[int, Sequence[SegmentLabel]], pair: int
    ) -> tuple[SegmentLabel, ...]:
        return tuple(labels.get(pair, (None,) * len(self.task.segments)))

    def _label(self, rater: str, pair: int, answer: Answer) -> SegmentLabel:
        if answer == "skip":
            return "skip"
        if answer == "tie":
            return 0.0
        return 1.0 if self.is_first(rater, pair, answer) else -1.0

    def _answer(self, rater: str, pair: int, label: SegmentLabel) -> Answer | None:
        if label is None or label == "skip":
            return label
        if label == 0:
            return "tie"
        return "left" if (label > 0) == self.is_first(rater, pair, "left") else "right"


def _finished(labels: Sequence[SegmentLabel] | None) -> bool:
    return labels is not None and None not in labels


def _started(labels: Sequence[SegmentLabel]) -> bool:
    return any(label is not None for label in labels)
