"""Recorded labels: the label set holds what the file says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo_video.errors import UserError
from dpo_video.labeler.recorded import Recorded
from dpo_video.strategies import LabelTask
from dpo_video.types import SegmentLabel, Video


class Notebook(LabelTask):
    """Three pairs, two of one prompt, and labels in memory."""

    def __init__(self) -> None:
        self.pairs, self.segments, self.fps = range(3), [slice(0, 2), slice(2, 4)], 8.0
        self.written: list[tuple[int, Sequence[SegmentLabel], str, str]] = []
        self.remarks: list[str] = []

    def prompt(self, pair: int) -> str:
        return ("a cat", "a cat", "a dog")[pair]

    def videos(self, pair: int) -> tuple[Video, Video]:
        raise AssertionError("a file needs no videos")

    @property
    def raters(self) -> Sequence[str]:
        return list(dict.fromkeys(by for _, _, by, _ in self.written))

    def labels_by(self, rater: str = "") -> Mapping[int, Sequence[SegmentLabel]]:
        return {pair: marks for pair, marks, by, _ in self.written if by == rater}

    def record(
        self, pair: int, marks: Sequence[SegmentLabel], *, rater: str = "", note: str = ""
    ) -> None:
        self.written.append((pair, marks, rater, note))

    def remark(self, text: str) -> None:
        self.remarks.append(text)


def labels(folder: Path, *lines: Any) -> Notebook:
    file = folder / "labels.jsonl"
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    task = Notebook()
    Recorded(file=str(file)).label_store(task)
    return task


def test_labels_can_be_numbers_words_and_named_by_prompt(tmp_path: Path) -> None:
    task = labels(
        tmp_path,
        {"pair": 0, "labels": [0.5, -1]},
        "",
        {"pair": 1, "label": "second", "rater": "ann", "note": "tears"},
        {"prompt": "a dog", "labels": ["tie", "skip"]},
    )
    assert task.written == [
        (0, (0.5, -1), "", ""), (1, (-1, -1), "ann", "tears"), (2, (0, "skip"), "", "")
    ]  # fmt: skip


def test_the_last_line_of_a_pair_and_rater_counts(tmp_path: Path) -> None:
    task = labels(
        tmp_path,
        {"pair": 0, "label": 1},
        {"pair": 0, "label": 1, "rater": "ann"},
        {"pair": 0, "label": -1},
    )
    assert task.labels_by() == {0: (-1, -1)} and task.labels_by("ann") == {0: (1, 1)}


def test_reading_again_records_changes_only(tmp_path: Path) -> None:
    task = labels(tmp_path, {"pair": 0, "label": 1}, {"pair": 1, "label": 1})
    file = tmp_path / "labels.jsonl"
    Recorded(file=str(file)).label_store(task)
    assert len(task.written) == 2
    file.write_text('{"pair": 0, "label": 0}\n{"pair": 1, "label": 1}\n')
    Recorded(file=str(file)).label_store(task)
    assert len(task.written) == 3 and task.labels_by()[0] == (0, 0)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "is not a label"),
        ({"pair": 3, "label": 1}, "names pair 3 of 3"),
        ({"prompt": "a cat", "label": 1}, "names a prompt that 2 pairs have"),
        ({"prompt": "a cow", "label": 1}, "names a prompt that 0 pairs have"),
        ({"pair": 0, "labels": [1]}, "has 1 label for 2 segments"),
        ({"pair": 0, "label": 2}, "is not a label .label"),
        ({"pair": 0, "label": "left"}, "is not a label .label"),
        ({"pair": 0}, 'is not a label .give either "label" or "labels"'),
        ({"label": 1}, 'is not a label .give either "pair" or "prompt"'),
        ({"pair": 0, "lable": 1}, 'is not a label .give either "label" or "labels"'),
        ('{"pair": 0, "label": 1, "label": -1}', "is not a label .it names 'label' twice"),
        ('{"pair": 0, "label": 1, "note": "\\ud800"}', "is not a label .it holds half a character"),
        ('{"pair": 0, "label": 1, "x": ' + "[" * 5000, "is not a label .it is nested too deeply"),
        ("7", "is not a label"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_recorded(
    tmp_path: Path, line: Any, sentence: str
) -> None:
    with pytest.raises(UserError, match=f"Line 2 of '.*' {sentence}") as caught:
        labels(tmp_path, {"pair": 0, "label": 1}, line)
    assert "\n" not in str(caught.value)


def test_lines_of_other_tools_are_read(tmp_path: Path) -> None:
    """A byte order mark, Windows' line ends, U+2028 in a note, and further columns."""
    file = tmp_path / "labels.jsonl"
    text = (
        '\ufeff{"pair": 0, "label": 1, "note": "a\u2028b", "id": 7}\r\n{"pair": 1, "label": 0}\r\n'
    )
    file.write_bytes(text.encode())
    task = Notebook()
    Recorded(file=str(file)).label_store(task)
    assert [(pair, note) for pair, _, _, note in task.written] == [(0, "a\u2028b"), (1, "")]
    assert task.remarks == [f"Columns that are not read: {file} (id)."]


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read .*--set labeler.file=labels.jsonl"):
        Recorded(file=str(tmp_path / "none.jsonl")).label_store(Notebook())
