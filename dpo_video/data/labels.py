"""Labels of a stored pair set, kept beside the pairs and never overwritten.

    STORE/labels/NAME.json    the recipe: the labeler, and the frames of each segment
    STORE/labels/NAME.jsonl   one line per label, on the disk before `record` returns

The last line of a pair and rater counts, so labelling again, withdrawing a label and undoing each
append a line. A torn last line is ignored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard, final

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from dpo_video.data.segments import broadcast
from dpo_video.errors import StoreError, UserError, first_fault, unknown
from dpo_video.support.atomic import append_line, write_text, writing
from dpo_video.support.formatting import counted
from dpo_video.support.reading import read_bytes
from dpo_video.support.statistics import cohen_kappa
from dpo_video.text import label_command
from dpo_video.types import SegmentLabel

FOLDER = "labels"
MAX_LABELS = 1 << 30  # bytes of a set
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LabelRecipe(_Record):
    """The labeler and the segments that all labels of a set share."""

    format: Literal["dpo-video labels"] = "dpo-video labels"
    version: Literal[1] = 1
    labeler: dict[str, Any]
    """The table [labeler], without the options that do not change the labels."""
    pairs: str
    """The key of the store's manifest."""
    identity: str
    """Hash of the weights that decoded the videos."""
    fps: float
    segments: tuple[tuple[int, int], ...]
    """First pixel frame of each segment and the frame after its last."""
    latents: tuple[tuple[int, int], ...]
    """The same in latent frames."""

    @model_validator(mode="after")
    def _valid_segments(self) -> Self:
        if len(self.latents) != len(self.segments):
            raise ValueError(f"{len(self.segments)} segments, {len(self.latents)} in latents")
        if any(start < 0 or stop < start for start, stop in (*self.segments, *self.latents)):
            raise ValueError("a segment ends before it begins")
        return self


class LabelLine(_Record):
    """One rater's labels of one pair."""

    pair: int = Field(ge=0)
    labels: tuple[Annotated[float, Field(ge=-1, le=1)] | Literal["skip"] | None, ...]
    """One per segment: in [-1, 1], +1 where the first video is better; "skip" where the rater
    declined; None where there is no label yet."""
    rater: str = ""
    note: str = ""
    time: datetime | None = None


class Agreement(_Record):
    """Agreement of two raters or labelers over the segments that both labelled."""

    segments: int
    share: float | None
    """Share of these segments whose labels have the same sign; None if there are none."""
    kappa: float | None
    """Cohen's kappa; None where it is undefined (see `cohen_kappa`)."""


PairLabels = Mapping[int, Sequence[SegmentLabel]]
"""Labels by pair, one per segment."""


@final
class LabelSet:
    """The labels of one labeler on one store, open for reading; `open_or_create` to write."""

    def __init__(self, store: Path, name: str) -> None:
        """Read the labels.

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
            self.recipe = LabelRecipe.model_validate_json(read_bytes(recipe))
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else first_fault(error)
            raise StoreError(
                f"'{recipe}' cannot be read ({reason}). Label under another name "
                "(--as), or update dpo-video if a newer version wrote it."
            ) from error
        self.lines = self._read()

    @classmethod
    def open_or_create(cls, store: Path, name: str, recipe: LabelRecipe) -> LabelSet:
        """Create a set, or open the existing one of the same recipe.

        A set without any label may change its recipe.
        """
        path = _path(store, name)
        header = path.with_suffix(".json")
        with writing(path):
            if header.exists() and cls(store, name).lines:
                if cls(store, name).recipe != recipe:
                    raise UserError(
                        f"'{path}' holds labels that were given with other options. Give these a "
                        "name of their own: --as NAME."
                    )
            else:
                write_text(header, recipe.model_dump_json(indent=2) + "\n")
            _drop_torn_line(path)
        return cls(store, name)

    @property
    def raters(self) -> list[str]:
        """Everyone who recorded a label, in order of appearance."""
        return list(dict.fromkeys(line.rater for line in self.lines))

    @property
    def pinned(self) -> str:
        """NAME@HASH, which stands for the labels as they are now."""
        return f"{self.name}@{fingerprint(self.tensors())}"

    def record(
        self,
        pair: int,
        labels: Sequence[SegmentLabel],
        *,
        rater: str = "",
        note: str = "",
        time: datetime | None = None,
    ) -> LabelLine:
        """Write a rater's labels of a pair to the disk before returning.

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
        """A rater's current labels, unfinished pairs included."""
        return {line.pair: line.labels for line in self.lines if line.rater == rater}

    def done(self, rater: str = "") -> set[int]:
        """The pairs that a rater has finished."""
        return {pair for pair, labels in self.labels_by(rater).items() if None not in labels}

    def consensus(self) -> dict[int, tuple[SegmentLabel, ...]]:
        """The vote of all raters who finished a pair; "skip" where all of them skipped."""
        finished: dict[int, list[tuple[SegmentLabel, ...]]] = {}
        for rater in self.raters:
            for pair, labels in self.labels_by(rater).items():
                if None not in labels:
                    finished.setdefault(pair, []).append(labels)
        return {pair: vote(finished[pair]) for pair in sorted(finished)}

    def tensors(self) -> dict[int, Float[Tensor, " s"]]:
        """The consensus as numbers: skips are 0, and pairs with nothing but skips are left out."""
        return {
            pair: torch.tensor([label if _is_number(label) else 0.0 for label in labels])
            for pair, labels in self.consensus().items()
            if any(map(_is_number, labels))
        }

    def _read(self) -> list[LabelLine]:
        if not self.path.exists():
            return []
        # What follows the last line break is torn, or another process is writing it.
        lines = []
        try:
            data = read_bytes(self.path, MAX_LABELS)
        except OSError as error:
            raise StoreError(
                f"'{self.path}' cannot be read: {error.strerror}. Restore it, or label under "
                "another name (--as)."
            ) from error
        for number, text in enumerate(data.split(b"\n")[:-1], start=1):
            try:
                line = LabelLine.model_validate_json(text)
            except ValidationError as error:
                raise StoreError(
                    f"Line {number} of '{self.path}' cannot be read ({first_fault(error)}). "
                    "Correct or delete that line: the others are kept."
                ) from error
            if len(line.labels) != len(self.recipe.segments):
                raise StoreError(
                    f"Line {number} of '{self.path}' has {counted(len(line.labels), 'label')} for "
                    f"{counted(len(self.recipe.segments), 'segment')}. Delete that line: the "
                    "others are kept."
                )
            lines.append(line)
        return lines


def names(store: Path) -> list[str]:
    """The names of a store's label sets that have labels."""
    headers = (store / FOLDER).glob("*.json")
    return sorted(path.stem for path in headers if _size(path.with_suffix(".jsonl")))


def vote(labels: Sequence[Sequence[SegmentLabel]]) -> tuple[SegmentLabel, ...]:
    """A single rater's labels unchanged; of several, the sign of the majority per segment.

    Equal counts are a tie. Skips do not vote; where all raters skip, the result is "skip".
    """
    if len(labels) == 1:
        return tuple(labels[0])
    return tuple(_majority(segment) for segment in zip(*labels, strict=True))


def open_label_sets(store: Path, chosen: Sequence[str]) -> list[LabelSet]:
    """Open label sets by name; NAME@HASH only if the labels have not changed since.

    Raises:
        UserError: for an unknown name, or if pinned labels have changed.
    """
    label_sets = []
    for text in chosen:
        name, _, pin = text.partition("@")
        label_set = LabelSet(store, name)
        if pin and text != label_set.pinned:
            raise UserError(
                f"The labels '{name}' in '{store}' are no longer those that this run was started "
                f"with. Start a new run with them as they are now: --labels {name}."
            )
        if not label_set.lines:
            raise UserError(
                f"The labels '{name}' in '{store}' are empty. Label the pairs again: "
                f"{label_command(store)}"
            )
        label_sets.append(label_set)
    return label_sets


def preferences(label_sets: Sequence[LabelSet], frames: int) -> dict[int, Float[Tensor, " f"]]:
    """Preferences per latent frame of all labelled pairs.

    The labels of a single set are used as they are. Several sets vote: the sign of the majority,
    equal counts are a tie. Their segments may differ.
    """
    votes: dict[int, list[Float[Tensor, " f"]]] = {}
    for label_set in label_sets:
        parts = [slice(start, stop) for start, stop in label_set.recipe.latents]
        for pair, labels in label_set.tensors().items():
            votes.setdefault(pair, []).append(broadcast(labels, parts, frames))
    return {
        pair: each[0] if len(label_sets) == 1 else torch.stack(each).sign().sum(dim=0).sign()
        for pair, each in sorted(votes.items())
    }


def agreement(first: PairLabels, second: PairLabels) -> Agreement:
    """Agreement of two raters or two label sets; a label counts by its sign."""
    both: list[tuple[int, int]] = []
    for pair in sorted(first.keys() & second.keys()):
        for one, other in zip(first[pair], second[pair], strict=True):
            if _is_number(one) and _is_number(other):
                both.append((_sign(one), _sign(other)))
    return Agreement(
        segments=len(both),
        share=sum(one == other for one, other in both) / len(both) if both else None,
        kappa=cohen_kappa([one for one, _ in both], [other for _, other in both]),
    )


def fingerprint(labels: Mapping[int, Float[Tensor, " s"]]) -> str:
    """A hash of the labels, independent of raters and order: 16 hex digits."""
    text = json.dumps({str(pair): labels[pair].tolist() for pair in sorted(labels)})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_number(label: SegmentLabel) -> TypeGuard[float]:
    return isinstance(label, int | float)


def _majority(labels: Iterable[SegmentLabel]) -> SegmentLabel:
    votes = [_sign(label) for label in labels if _is_number(label)]
    return float(_sign(sum(votes))) if votes else "skip"


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _path(store: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"'{name}' cannot name labels. Use letters, digits, '.', '_' and '-': --as NAME."
        )
    return store / FOLDER / f"{name}.jsonl"


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        complete = data.rfind(b"\n") + 1
        if complete < len(data):
            with path.open("r+b") as file:
                file.truncate(complete)
