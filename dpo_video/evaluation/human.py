"""Which of base and tuned people prefer, judged blindly on the labelling page. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from dpo_video.support.formatting import counted, percent
from dpo_video.support.statistics import Record

ANSWERS = "preferences.json"
"""File of an evaluation's folder: rater to pair to +1 (tuned), -1 (base), 0 (equal) or "skip"."""
Answers = dict[str, dict[int, float | str | None]]
_ANSWERS: TypeAdapter[Answers] = TypeAdapter(Answers)
_Z = 1.959963984540054  # of a 95% interval


class HumanPreference(Record):
    """The votes of people over the pairs of an evaluation. Each pair counts once."""

    pairs: int = Field(ge=1)
    """Pairs that somebody judged."""
    raters: int = Field(ge=1)
    tuned: int = Field(ge=0)
    """Pairs for whose tuned video more raters voted."""
    base: int = Field(ge=0)
    equal: int = Field(ge=0)
    """Pairs with as many votes for one as for the other."""

    @property
    def rate(self) -> float | None:
        """Share of the decided pairs that prefer the tuned video; None if none is decided."""
        decided = self.tuned + self.base
        return self.tuned / decided if decided else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% Wilson interval of the rate (Wilson 1927)."""
        decided = self.tuned + self.base
        return wilson(self.tuned, decided) if decided else None

    @property
    def text(self) -> str:
        """The result as a sentence."""
        people = "1 person" if self.raters == 1 else f"{self.raters} people"
        counts = f"{self.tuned} tuned, {self.base} base, {self.equal} equal"
        head = f"Blind comparison by {people} on {counted(self.pairs, 'pair')} ({counts})"
        if self.rate is None or self.interval is None:
            return f"{head}: no pair is decided."
        low, high = (percent(end).lstrip("+") for end in self.interval)
        found = "" if self.interval[0] > 0.5 or self.interval[1] < 0.5 else "; it includes 50%"
        return (
            f"{head}: the tuned video wins {percent(self.rate).lstrip('+')} of the decided ones "
            f"(95% Wilson interval {low} to {high}{found})."
        )


def wilson(wins: int, count: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a share of `count` independent trials.

    Raises:
        ValueError: if there are no trials.
    """
    if not 0 <= wins <= count or count < 1:
        raise ValueError(f"{wins} wins in {count} trials")
    share, square = wins / count, _Z * _Z / count
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / count / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def read_answers(folder: Path) -> Answers:
    """The answers in an evaluation's folder; none if there are none, or they cannot be read."""
    try:
        return _ANSWERS.validate_json((folder / ANSWERS).read_bytes())
    except (OSError, ValidationError):
        return {}


def answers_text(answers: Mapping[str, Mapping[int, float | str | None]]) -> str:
    """The answers as JSON."""
    return json.dumps(answers, indent=1, sort_keys=True) + "\n"


def preference_in(folder: Path, pairs: int) -> HumanPreference | None:
    """What people preferred, by the answers in an evaluation's folder; None without answers."""
    answers = read_answers(folder)
    votes: dict[int, list[float]] = {}
    raters = set()
    for rater, given in answers.items():
        for pair, answer in given.items():
            if isinstance(answer, int | float) and 0 <= pair < pairs:
                votes.setdefault(pair, []).append(answer)
                raters.add(rater)
    if not votes:
        return None
    sums = [_sign(each) for each in votes.values()]
    return HumanPreference(
        pairs=len(votes),
        raters=len(raters),
        tuned=sums.count(1),
        base=sums.count(-1),
        equal=sums.count(0),
    )


def _sign(votes: Sequence[float]) -> int:
    total = sum((vote > 0) - (vote < 0) for vote in votes)
    return (total > 0) - (total < 0)
