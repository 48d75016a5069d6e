"""The videos of one model in an evaluation, on the disk, each with what was measured on it.

    000-base.mp4     the video of the first prompt
    000-base.json    what it was drawn from, its hash, and its values

A video counts once its record agrees with it. So an evaluation that was killed is resumed after
its last video, and the order of the processes that drew them does not matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError

from dpo_video.support.atomic import write_bytes, write_text, writing
from dpo_video.support.hashing import file_digest
from dpo_video.support.reading import read_bytes
from dpo_video.support.statistics import Record
from dpo_video.types import Prompt


class VideoRecord(Record):
    """What a video was drawn from, and what was measured on it."""

    key: str
    """Hash of everything that the video depends on."""
    video: str
    """SHA-256 of the file."""
    values: dict[str, float] = Field(default_factory=dict)
    """Values by the metric's key, measured before the video was encoded."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Why a metric has no value, by its key."""


def hash_of(*parts: Any) -> str:
    """A hash of JSON-ready values: 16 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class VideoSet:
    """The videos of one side of an evaluation."""

    folder: Path
    side: str
    """`base` or `tuned`."""
    keys: tuple[str, ...]
    """One per video: a hash of everything that it depends on."""

    @classmethod
    def of(
        cls, folder: Path, side: str, drawn_from: Any, batches: Sequence[Sequence[Prompt]]
    ) -> Self:
        """The videos of prompts in batches.

        A video depends on its whole batch, by rounding.

        Args:
            folder: Their folder.
            side: `base` or `tuned`.
            drawn_from: What all videos depend on, as JSON-ready data.
            batches: The prompts with their seeds.
        """
        keys = []
        for batch in batches:
            rows = [[row.text, row.seed, row.negative_prompt] for row in batch]
            keys += [hash_of(drawn_from, rows, number) for number in range(len(rows))]
        return cls(folder=folder, side=side, keys=tuple(keys))

    def __len__(self) -> int:
        return len(self.keys)

    def file(self, index: int) -> Path:
        """The video's path."""
        return self.folder / f"{index:03d}-{self.side}.mp4"

    def write(
        self, index: int, video: bytes, values: dict[str, float], failed: dict[str, str]
    ) -> None:
        """Write a video and its record; values of other metrics on the same video are kept."""
        before = self._parsed(index)
        same = before is not None and before.key == self.keys[index]
        kept = before.values if same and before is not None else {}
        record = VideoRecord(
            key=self.keys[index],
            video=hashlib.sha256(video).hexdigest(),
            values={**kept, **values},
            failed=failed,
        )
        with writing(self.folder):
            write_bytes(self.file(index), video)
            write_text(self._record_file(index), record.model_dump_json(indent=1) + "\n")

    def record(self, index: int) -> VideoRecord | None:
        """The record of a finished video; None if it has to be drawn."""
        record = self._parsed(index)
        if record is None or record.key != self.keys[index]:
            return None
        try:
            same = file_digest(self.file(index)) == record.video
        except OSError:
            return None
        return record if same else None

    def lacks(self, index: int, metrics: Collection[str]) -> bool:
        """Whether a video has to be drawn, or some of the metrics were not measured on it."""
        record = self.record(index)
        return record is None or any(
            key not in record.values and key not in record.failed for key in metrics
        )

    def link_into(self, other: VideoSet) -> None:
        """Make the videos appear in another set's folder as well."""
        for index in range(len(self)):
            source, target = self.file(index), other.file(index)
            if target.exists() and target.samefile(source):
                continue
            with writing(other.folder):
                other.folder.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".partial-{target.name}")
                partial.unlink(missing_ok=True)
                try:
                    os.link(source, partial)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(source, partial)
                partial.replace(target)

    def _record_file(self, index: int) -> Path:
        return self.file(index).with_suffix(".json")

    def _parsed(self, index: int) -> VideoRecord | None:
        try:
            return VideoRecord.model_validate_json(read_bytes(self._record_file(index)))
        except (OSError, ValidationError):
            return None
