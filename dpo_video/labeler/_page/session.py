"""Raters at work on a set: what each sees next, on which side, and how far they are."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from pydantic import BaseModel, ConfigDict

from dpo_video.data.labels import Agreement, agreement
from dpo_video.strategies import LabelTask
from dpo_video.types import SegmentLabel

Side = Literal["left", "right"]
Answer = Literal["left", "right", "tie", "skip"]
AHEAD = 2  # pairs that the page may fetch in advance
IDLE = 60.0  # seconds; a longer silence is a break and does not count as work
PACE_AFTER = 3  # pairs; before that a pace means nothing


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shown(_Message):
    """The pair under judgement, as its rater sees it."""

    pair: int
    prompt: str
    answers: tuple[Answer | None, ...]
    """One a segment, in the words of the rater's own sides."""


class View(_Message):
    """All that the page needs to go on."""

    rater: str
    current: Shown | None
    """None once everything has an answer."""
    ahead: tuple[int, ...]
    """The pairs after it."""
    finished: int
    total: int
    pace: float | None
    """Pairs per hour of work, breaks left out."""
    revision: int
    """Counts changes, so that an undo that is sent twice is done once."""
    undoable: bool


class OtherRater(_Message):
    """Agreement with somebody else."""

    rater: str
    agreement: Agreement


class Summary(_Message):
    """What one rater did, in this session and before."""

    rater: str
    finished: int
    total: int
    answers: dict[Answer, int]
    """Segments by answer; left and right tell whether the rater leans to a side."""
    pace: float | None
    minutes: float
    """Of work in this session."""
    others: tuple[OtherRater, ...]


@dataclass(kw_only=True)
class _Rater:
    """What a session knows of a rater that the label_set does not."""

    finished_before: int
    last: float
    """When something was heard last, by the clock."""
    worked: float = 0.0
    """Seconds."""
    revision: int = 0
    history: list[tuple[int, tuple[SegmentLabel, ...]]] = field(default_factory=list)
    """Pairs with the marks that they had before each change."""


@final
class LabelSession:
    """The raters of one run of the server.

    All raters go through the set in one random order: whoever stops early has seen a fair sample,
    and has seen the same pairs as the others. Sides are drawn for every rater anew, or a leaning to
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
        """What a rater is to be shown now."""
        state = self._state(rater)
        marks = self.task.labels_by(rater)
        open_pairs = [pair for pair in self._order if not _finished(marks.get(pair))]
        current = None
        if open_pairs:
            pair = open_pairs[0]
            answers = tuple(self._answer(rater, pair, mark) for mark in self._marks(marks, pair))
            current = Shown(pair=pair, prompt=self.task.prompt(pair), answers=answers)
        return View(
            rater=rater,
            current=current,
            ahead=tuple(open_pairs[1 : 1 + AHEAD]),
            finished=len(self._order) - len(open_pairs),
            total=len(self._order),
            pace=self._pace(rater),
            revision=state.revision,
            undoable=bool(state.history) or any(_begun(line) for line in marks.values()),
        )

    def answer(
        self, rater: str, pair: int, segment: int, answer: Answer, *, rest: bool = False
    ) -> View:
        """Save an answer; it is on the disk when this returns.

        Args:
            rater: Who gives it.
            pair: What about, whether it is the current one or not.
            segment: Its segment.
            answer: As the rater sees it.
            rest: Give it to all other open segments of the pair too.

        Raises:
            KeyError: If there is no such pair or segment.
        """
        if pair not in self.task.pairs or not 0 <= segment < len(self.task.segments):
            raise KeyError(f"there is no segment {segment} of a pair {pair}")
        state = self._state(rater)
        before = self._marks(self.task.labels_by(rater), pair)
        mark = self._mark(rater, pair, answer)
        after = tuple(
            mark if number == segment or (rest and old is None) else old
            for number, old in enumerate(before)
        )
        self.task.record(pair, after, rater=rater)
        state.history.append((pair, before))
        self._heard(state)
        return self.view(rater)

    def undo(self, rater: str, revision: int) -> View:
        """Take the last change back; without effect if `revision` is no longer the current one.

        What an earlier run of the server saved is taken back in the order of the pairs.
        """
        state = self._state(rater)
        if revision == state.revision and (change := self._last_change(rater)):
            pair, before = change
            self.task.record(pair, before, rater=rater)
            if state.history:
                state.history.pop()
            self._heard(state)
        return self.view(rater)

    def flipped(self, rater: str, pair: int) -> bool:
        """Whether a rater sees the pair's first video on the right."""
        text = f"{self._seed} {pair} {rater}"
        return hashlib.sha256(text.encode()).digest()[0] % 2 == 1

    def is_first(self, rater: str, pair: int, side: Side) -> bool:
        """Whether a side shows the pair's first video."""
        return (side == "left") != self.flipped(rater, pair)

    def raters(self) -> dict[str, int]:
        """Everyone known, with how many pairs they finished."""
        names = dict.fromkeys([*self.task.raters, *self._raters])
        return {name: self._count_finished(name) for name in names}

    def summary(self, rater: str) -> Summary:
        """What a rater did, and how far the others agree."""
        marks = self.task.labels_by(rater)
        counts: Counter[Answer] = Counter()
        for pair, line in marks.items():
            counts.update(
                answer for mark in line if (answer := self._answer(rater, pair, mark)) is not None
            )
        others = tuple(
            OtherRater(rater=name, agreement=agreement(marks, self.task.labels_by(name)))
            for name in self.raters()
            if name != rater
        )
        return Summary(
            rater=rater,
            finished=self._count_finished(rater),
            total=len(self._order),
            answers={
                "left": counts["left"],
                "right": counts["right"],
                "tie": counts["tie"],
                "skip": counts["skip"],
            },
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

    def _heard(self, state: _Rater) -> None:
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
        marks = self.task.labels_by(rater)
        return sum(_finished(marks.get(pair)) for pair in self._order)

    def _last_change(self, rater: str) -> tuple[int, tuple[SegmentLabel, ...]] | None:
        history = self._state(rater).history
        if history:
            return history[-1]
        marks = self.task.labels_by(rater)
        for pair in reversed(self._order):
            line = self._marks(marks, pair)
            given = [number for number, mark in enumerate(line) if mark is not None]
            if given:
                return pair, (*line[: given[-1]], None, *line[given[-1] + 1 :])
        return None

    def _marks(
        self, marks: Mapping[int, Sequence[SegmentLabel]], pair: int
    ) -> tuple[SegmentLabel, ...]:
        return tuple(marks.get(pair, (None,) * len(self.task.segments)))

    def _mark(self, rater: str, pair: int, answer: Answer) -> SegmentLabel:
        if answer == "skip":
            return "skip"
        if answer == "tie":
            return 0.0
        return 1.0 if self.is_first(rater, pair, answer) else -1.0

    def _answer(self, rater: str, pair: int, mark: SegmentLabel) -> Answer | None:
        if mark is None or mark == "skip":
            return mark
        if mark == 0:
            return "tie"
        return "left" if (mark > 0) == self.is_first(rater, pair, "left") else "right"


def _finished(marks: Sequence[SegmentLabel] | None) -> bool:
    return marks is not None and None not in marks


def _begun(marks: Sequence[SegmentLabel]) -> bool:
    return any(mark is not None for mark in marks)
