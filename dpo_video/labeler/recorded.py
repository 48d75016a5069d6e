"""Labels from a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpo_video.errors import UserError, first_fault
from dpo_video.paths import LocalPath
from dpo_video.strategies import LabelTask, StoreLabeler
from dpo_video.support.formatting import counted
from dpo_video.support.reading import composed, one_spaced, parse_json, read_lines
from dpo_video.types import SegmentLabel

_WORDS: Mapping[str, float] = {"first": 1.0, "second": -1.0, "tie": 0.0}
_Label = Annotated[float, Field(ge=-1, le=1)] | Literal["first", "second", "tie", "skip"]


class _Line(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    pair: int | None = Field(default=None, ge=0)
    prompt: str | None = None
    label: _Label | None = None
    labels: tuple[_Label, ...] | None = None
    rater: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _one_of_each(self) -> _Line:
        if (self.pair is None) == (self.prompt is None):
            raise ValueError('give either "pair" or "prompt"')
        if (self.label is None) == (self.labels is None):
            raise ValueError('give either "label" or "labels"')
        return self

    def by_segment(self, segments: int) -> tuple[SegmentLabel, ...]:
        """One label per segment."""
        given = self.labels if self.labels is not None else (self.label,) * segments
        return tuple(_number(label) for label in given)


@final
class Recorded(StoreLabeler):
    """A file: reads labels from JSON Lines.

    Each line labels a pair, named by its index, or by its prompt if no other pair has that prompt:

        {"pair": 0, "labels": ["first", "tie"]}
        {"pair": 1, "label": -1, "rater": "ann", "note": "the first one tears"}
        {"prompt": "a red square moving left slowly", "label": "second"}

    `labels` has one entry per segment; `label` applies to all segments. An entry is a number from
    -1 (the second is better) to 1 (the first is better), or first, second, tie or skip. The last
    line of a pair and rater counts. Pairs without a line stay unlabelled.
    """

    incidental: ClassVar[frozenset[str]] = frozenset({"file"})

    file: LocalPath
    """The path of the JSONL file."""

    def label_store(self, task: LabelTask) -> None:
        """Record the labels that differ from the recorded ones; none if any line is invalid."""
        final: dict[tuple[str, int], tuple[tuple[SegmentLabel, ...], str]] = {}
        for number, line in self._lines(task):
            labels = line.by_segment(len(task.segments))
            if len(labels) != len(task.segments):
                raise self._error(
                    number,
                    f"has {counted(len(labels), 'label')} for "
                    f"{counted(len(task.segments), 'segment')}",
                )
            final[line.rater, self._pair(number, line, task)] = labels, line.note
        for (rater, pair), (labels, note) in final.items():
            if task.labels_by(rater).get(pair) != labels:
                task.record(pair, labels, rater=rater, note=note)

    def _lines(self, task: LabelTask) -> Iterator[tuple[int, _Line]]:
        columns: set[str] = set()
        try:
            for number, text in read_lines(Path(self.file)):
                try:
                    entry = parse_json(text)
                    line = _Line.model_validate(entry)
                except ValueError as error:
                    raise self._error(number, f"is not a label ({_reason(error)})") from error
                columns |= entry.keys() - _Line.model_fields.keys()
                yield number, line
        except OSError as error:
            raise UserError(
                f"Cannot read '{self.file}': {error.strerror}. Name a JSONL file: "
                "--set labeler.file=labels.jsonl"
            ) from error
        if columns:
            names = ", ".join(sorted(columns))
            task.remark(f"Columns that are not read: {self.file} ({names}).")

    def _pair(self, number: int, line: _Line, task: LabelTask) -> int:
        if line.pair is not None:
            if line.pair not in task.pairs:
                raise self._error(number, f"names pair {line.pair} of {len(task.pairs)}")
            return line.pair
        wanted = _plain(line.prompt or "")
        found = [pair for pair in task.pairs if _plain(task.prompt(pair)) == wanted]
        if len(found) != 1:
            raise self._error(number, f"names a prompt that {len(found)} pairs have")
        return found[0]

    def _error(self, number: int, what: str) -> UserError:
        return UserError(
            f"Line {number} of '{self.file}' {what}. Correct it; see `dpo-video show labeler "
            "recorded`."
        )


def _plain(prompt: str) -> str:
    """A prompt as `build` stores it, in one form of Unicode."""
    return composed(one_spaced(prompt))


def _number(label: Any) -> SegmentLabel:
    return "skip" if label == "skip" else _WORDS.get(label, label)


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return first_fault(error)
