"""Labels of a stored set, beside the pairs and never overwritten.

    STORE/labels/NAME.json    the recipe: who labels, and which frames a segment covers
    STORE/labels/NAME.jsonl   one line a label, written through to the disk as it is given

Of the lines of one pair and rater the last one counts: labelling again, taking a label back and
undoing are all one more line. A torn last line is a label that was not given.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, final

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from dpo_video.data.segments import broadcast
from dpo_video.errors import StoreError, UserError, first_fault, unknown
from dpo_video.support.atomic import append_line, write_text, writing
from dpo_video.support.statistics import cohen_kappa
from dpo_video.types import SegmentLabel

FOLDER = "labels"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LabelRecipe(_Record):
    """What the labels of a book have in common."""

    format: Literal["dpo-video labels"] = "dpo-video labels"
    version: Literal[1] = 1
    labeler: dict[str, Any]
    """The table [labeler], without the options that change nothing about what it says."""
    pairs: str
    """The key of the store's manifest."""
    identity: str
    """The hash of the weights that decoded the videos."""
    fps: float
    segments: tuple[tuple[int, int], ...]
    """First pixel frame of each segment and the one after its last."""
    latents: tuple[tuple[int, int], ...]
    """The latent frames that each covers, likewise."""

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if len(self.latents) != len(self.segments):
            raise ValueError(f"{len(self.segments)} segments, {len(self.latents)} in latents")
        if any(start < 0 or stop < start for start, stop in (*self.segments, *self.latents)):
            raise ValueError("a segment ends before it begins")
        return self


class LabelLine(_Record):
    """What one rater said of one pair."""

    pair: int = Field(ge=0)
    labels: tuple[Annotated[float, Field(ge=-1, le=1)] | Literal["skip"] | None, ...]
    """One a segment: in [-1, 1], +1 where the first is better; "skip" where the rater would not
    say; None where nothing was said yet."""
    rater: str = ""
    note: str = ""
    time: datetime | None = None

    @property
    def finished(self) -> bool:
        """Whether every segment was judged or skipped."""
        return None not in self.labels


class Agreement(_Record):
    """How far two raters or labelers agree, over the segments that both judged."""

    segments: int
    share: float | None
    """Of the segments with the same sign; None if there are none."""
    kappa: float | None
    """Cohen's; None where it is undefined (see `cohen_kappa`)."""


Marks = Mapping[int, Sequence[SegmentLabel]]


@final
class LabelSet:
    """The labels of one labeler on one store, open for reading; `open_or_create` to write."""

    def __init__(self, store: Path, name: str) -> None:
        """Read a book.

        Raises:
            UserError: if the store has no labels of that name.
            StoreError: if they are damaged.
        """
        self.name = name
        self.path = _path(store, name)
        recipe = self.path.with_suffix(".json")
        if not recipe.is_file():
            raise unknown(f"set of labels in '{store}'", name, names(store))
        try:
            self.recipe = LabelRecipe.model_validate_json(recipe.read_bytes())
        except ValidationError as error:
            raise StoreError(
                f"'{recipe}' cannot be read ({first_fault(error)}). Label under another name "
                "(--as), or update dpo-video if a newer version wrote it."
            ) from error
        self.lines = self._read()

    @classmethod
    def open_or_create(cls, store: Path, name: str, recipe: LabelRecipe) -> LabelSet:
        """Begin a book, or go on with the one of the same recipe that is there.

        One without any label is begun anew: somebody corrected an option that did not work.
        """
        path = _path(store, name)
        header = path.with_suffix(".json")
        with writing(path):
            if header.exists() and cls(store, name).lines:
                if cls(store, name).recipe != recipe:
                    raise UserError(
                        f"'{path}' holds labels of another recipe. Give these a name of their own: "
                        "--as NAME."
                    )
            else:
                write_text(header, recipe.model_dump_json(indent=2) + "\n")
            _drop_torn_line(path)
        return cls(store, name)

    @property
    def raters(self) -> list[str]:
        """Everyone who said something, in order of appearance."""
        return list(dict.fromkeys(line.rater for line in self.lines))

    def record(
        self,
        pair: int,
        labels: Sequence[SegmentLabel],
        *,
        rater: str = "",
        note: str = "",
        time: datetime | None = None,
    ) -> LabelLine:
        """Write a label; it is on the disk when this returns.

        Raises:
            ValueError: for another number of labels than segments, or one outside [-1, 1].
        """
        if len(labels) != len(self.recipe.segments):
            raise ValueError(f"{len(labels)} labels for {len(self.recipe.segments)} segments")
        line = LabelLine(pair=pair, labels=tuple(labels), rater=rater, note=note, time=time)
        with writing(self.path):
            append_line(self.path, line.model_dump_json(exclude_defaults=True).encode())
        self.lines.append(line)
        return line

    def labels_by(self, rater: str = "") -> dict[int, tuple[SegmentLabel, ...]]:
        """What a rater says by now of every pair, unfinished ones included."""
        return {line.pair: line.labels for line in self.lines if line.rater == rater}

    def done(self, rater: str = "") -> set[int]:
        """The pairs that a rater has finished."""
        return {pair for pair, marks in self.labels_by(rater).items() if None not in marks}

    def verdicts(self) -> dict[int, tuple[SegmentLabel, ...]]:
        """Per pair what the raters who finished it say together: one's own marks, or their vote.

        "skip" where nobody would say.
        """
        finished: dict[int, list[tuple[SegmentLabel, ...]]] = {}
        for rater in self.raters:
            for pair, marks in self.labels_by(rater).items():
                if None not in marks:
                    finished.setdefault(pair, []).append(marks)
        return {pair: vote(finished[pair]) for pair in sorted(finished)}

    def labels(self) -> dict[int, Float[Tensor, " s"]]:
        """The verdicts as numbers, without the pairs that nobody would judge; skips are ties."""
        return tensors(self.verdicts())

    def _read(self) -> list[LabelLine]:
        if not self.path.exists():
            return []
        # What follows the last line break was cut off while it was written, or is being written.
        lines = []
        for number, text in enumerate(self.path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                line = LabelLine.model_validate_json(text)
            except ValidationError as error:
                raise StoreError(
                    f"Line {number} of '{self.path}' cannot be read ({first_fault(error)}). "
                    "Correct or delete that line: the others are kept."
                ) from error
            if len(line.labels) != len(self.recipe.segments):
                raise StoreError(
                    f"Line {number} of '{self.path}' has {len(line.labels)} labels for "
                    f"{len(self.recipe.segments)} segments. Delete that line: the others are kept."
                )
            lines.append(line)
        return lines


def names(store: Path) -> list[str]:
    """The names of a store's books."""
    return sorted(path.stem for path in (store / FOLDER).glob("*.json"))


def vote(marks: Sequence[Sequence[SegmentLabel]]) -> tuple[SegmentLabel, ...]:
    """One's own marks, or per segment the sign that most raters give: even counts are ties.

    Skips do not vote; where all skip, so does the vote.
    """
    if len(marks) == 1:
        return tuple(marks[0])
    return tuple(_majority(segment) for segment in zip(*marks, strict=True))


def tensors(verdicts: Marks) -> dict[int, Float[Tensor, " s"]]:
    """Marks as numbers, skips as ties, without the pairs that have nothing but skips."""
    return {
        pair: torch.tensor([mark if isinstance(mark, int | float) else 0.0 for mark in marks])
        for pair, marks in verdicts.items()
        if any(isinstance(mark, int | float) for mark in marks)
    }


def open_books(store: Path, chosen: Sequence[str]) -> list[LabelSet]:
    """The books of these names; where one is pinned, NAME@HASH, only if it still says the same.

    Raises:
        UserError: for an unknown name, and for a pinned book that was changed.
    """
    books = []
    for text in chosen:
        name, _, pin = text.partition("@")
        book = LabelSet(store, name)
        if pin and pin != fingerprint(book.labels()):
            raise UserError(
                f"The labels '{name}' in '{store}' are no longer those that this run was begun "
                f"with. Begin a new run with them as they are now: --labels {name}."
            )
        books.append(book)
    return books


def pinned(book: LabelSet) -> str:
    """NAME@HASH: a book as it is now."""
    return f"{book.name}@{fingerprint(book.labels())}"


def preferences(books: Sequence[LabelSet], frames: int) -> dict[int, Float[Tensor, " f"]]:
    """What books say per latent frame of the pairs that they label.

    One book's labels as they are; of several, the sign that most of them give, even counts ties.
    Their segments may differ.
    """
    said: dict[int, list[Float[Tensor, " f"]]] = {}
    for book in books:
        parts = [slice(start, stop) for start, stop in book.recipe.latents]
        for pair, labels in book.labels().items():
            said.setdefault(pair, []).append(broadcast(labels, parts, frames))
    return {
        pair: each[0] if len(books) == 1 else torch.stack(each).sign().sum(dim=0).sign()
        for pair, each in sorted(said.items())
    }


def agreement(first: Marks, second: Marks) -> Agreement:
    """Of two raters' or two books' marks; a label counts by its sign."""
    both: list[tuple[int, int]] = []
    for pair in sorted(first.keys() & second.keys()):
        for one, other in zip(first[pair], second[pair], strict=True):
            if isinstance(one, int | float) and isinstance(other, int | float):
                both.append((_sign(one), _sign(other)))
    return Agreement(
        segments=len(both),
        share=sum(one == other for one, other in both) / len(both) if both else None,
        kappa=cohen_kappa([one for one, _ in both], [other for _, other in both]),
    )


def fingerprint(labels: Mapping[int, Float[Tensor, " s"]]) -> str:
    """A hash of what labels say, whoever gave them and in whatever order: 16 hex digits."""
    text = json.dumps({str(pair): labels[pair].tolist() for pair in sorted(labels)})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _majority(marks: Sequence[SegmentLabel]) -> SegmentLabel:
    given = [mark for mark in marks if isinstance(mark, int | float)]
    return float(_sign(sum(_sign(mark) for mark in given))) if given else "skip"


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _path(store: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"'{name}' cannot name labels. Use letters, digits, '.', '_' and '-': --as NAME."
        )
    return store / FOLDER / f"{name}.jsonl"


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)
