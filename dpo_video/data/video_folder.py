"""A folder of drawn videos: a named file for every prompt and seed, and what each was drawn from.

Its metadata.jsonl makes the folder one of captioned clips, and a list of prompts with seeds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_video.data.captions import METADATA
from dpo_video.errors import UserError
from dpo_video.support.atomic import write_text, writing
from dpo_video.support.reading import composed, parse_json, read_lines
from dpo_video.types import Prompt

_SLUG = 40  # characters of a prompt in a file's name
_DRAWN = "drawn"


def video_names(rows: Sequence[Prompt]) -> list[str]:
    """A file's name for every row: its number, the beginning of its prompt, and its seed."""
    names = []
    for index, row in enumerate(rows):
        slug = re.sub(r"\W+", "-", composed(row.text).lower())[:_SLUG].strip("-") or "video"
        names.append(f"{index:03d}-{slug}-seed{row.seed}.mp4")
    return names


class VideoFolder:
    """The record of a folder's videos, each of which is drawn once."""

    def __init__(self, folder: Path) -> None:
        """Open a folder, which need not exist.

        Raises:
            UserError: if its metadata.jsonl is of other videos, or cannot be read.
        """
        self.folder = folder
        self._rows: dict[str, dict[str, Any]] = {}
        path = folder / METADATA
        try:
            for _, line in read_lines(path) if path.exists() else ():
                row = parse_json(line)
                if not isinstance(row, dict) or not {"file_name", _DRAWN} <= row.keys():
                    raise ValueError("they were not written by generate")
                self._rows[str(row["file_name"])] = row
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"'{path}' is not a record of drawn videos ({reason}). Name another folder with "
                "--out."
            ) from error

    def has(self, name: str, key: str) -> bool:
        """Whether a video exists that was drawn from what `key` identifies."""
        row = self._rows.get(name, {})
        return row.get(_DRAWN) == key and (self.folder / name).is_file()

    def forget(self, name: str) -> None:
        """Drop a video from the record before another one takes its name."""
        if self._rows.pop(name, None) is not None:
            self._write()

    def add(self, name: str, prompt: Prompt, key: str) -> None:
        """Record a video, once its file is written."""
        row = {"file_name": name, "text": prompt.text, "seed": prompt.seed}
        if prompt.negative_prompt is not None:
            row["negative_prompt"] = prompt.negative_prompt
        self._rows[name] = {**row, _DRAWN: key}
        self._write()

    def _write(self) -> None:
        with writing(self.folder):
            lines = (
                json.dumps(self._rows[name], ensure_ascii=False) for name in sorted(self._rows)
            )
            write_text(self.folder / METADATA, "".join(f"{line}\n" for line in lines))
