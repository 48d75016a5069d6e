"""Lists of prompts: a file of them, or one of the package's own lists."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from dpo_video.errors import UserError
from dpo_video.paths import PROMPT_LISTS
from dpo_video.settings import LARGEST_SEED
from dpo_video.support.reading import one_spaced, parse_json, read_lines, read_text
from dpo_video.types import Prompt

_TABLES = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson")
_TEXTS = ("prompt", "text")
_COLUMNS = (*_TEXTS, "seed", "negative_prompt")


def load_prompts(source: str, note: Callable[[str], None] = lambda text: None) -> list[Prompt]:
    """Read a list of prompts.

    Args:
        source: `training` or `evaluation`, the package's own lists; or a UTF-8 file. The suffixes
            .csv, .tsv and .jsonl give a table with a column `prompt` (or `text`) and optional
            columns `seed` and `negative_prompt`. Any other file holds one prompt per line.
        note: Receives a sentence on columns that are not read.

    Raises:
        UserError: if the file cannot be read, is malformed, or has no prompt.
    """
    if source in PROMPT_LISTS:
        return [Prompt(text=text) for text in shipped_prompts(source)]
    path, columns = Path(source), set[str]()
    try:
        prompts = list(_read(path, columns))
    except OSError as error:
        raise UserError(
            f"Cannot read the prompts in '{path}': {error.strerror}. Name a UTF-8 file with one "
            f"prompt per line, a .csv or a .jsonl, or a list of the package: "
            f"{', '.join(PROMPT_LISTS)}."
        ) from error
    if not prompts:
        raise UserError(f"'{path}' holds no prompt. Write one per line.")
    if strays := sorted(columns - {*_COLUMNS}):
        note(f"Columns of '{path}' that are not read: {', '.join(strays)}.")
    return prompts


def shipped_prompts(name: str) -> list[str]:
    """The texts of one of the package's own lists.

    The lists `training` and `evaluation` have no prompt in common.
    """
    text = (files("dpo_video.data") / "prompt_lists" / f"{name}.txt").read_text(encoding="utf-8")
    return text.splitlines()


def cycled(texts: Sequence[str], count: int) -> list[str]:
    """`count` texts, from the beginning again after the last one."""
    return [texts[index % len(texts)] for index in range(count)]


def prompt_table(prompts: Sequence[Prompt], videos: int, seed: int) -> list[Prompt]:
    """Every prompt with its seed, `videos` times: all prompts once, then all a second time.

    Video `i` has the seed `seed + i`. A prompt with a seed of its own has that one, then the next.
    """
    rows: list[Prompt] = []
    for repetition in range(videos):
        for prompt in prompts:
            own = seed + len(rows) if prompt.seed is None else prompt.seed + repetition
            rows.append(replace(prompt, seed=own))
    return rows


def batched_prompts(rows: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Consecutive rows in batches of at most `size` that share their negative prompt."""
    for _, group in groupby(rows, key=lambda row: row.negative_prompt):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def negative_option(negative_prompt: str | None) -> dict[str, Any]:
    """The option of `VideoModel.sample` for a prompt's own negative prompt, if it has one."""
    return {} if negative_prompt is None else {"negative_prompt": negative_prompt}


def _read(path: Path, columns: set[str]) -> Iterator[Prompt]:
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        rows = _csv_rows(path, _TABLES[suffix])
    elif suffix in _LINES:
        rows = _json_rows(path)
    else:
        for _, line in read_lines(path):
            yield Prompt(text=one_spaced(line))
        return
    for where, row in rows:
        columns.update(row)
        yield _prompt(row, where)


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in read_lines(path):
        where = f"Line {number} of '{path}'"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f'{where} is not JSON ({error}). Write {{"prompt": "..."}}.') from error
        if not isinstance(row, dict):
            raise UserError(f'{where} is not an object. Write {{"prompt": "..."}}.')
        yield where, row


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not header:
            return
        if not {*_TEXTS} & {*header} or len({*header}) < len(header):
            raise UserError(
                f"The first line of '{path}' is not a header with a column 'prompt'. Write it "
                "above the rows, each name once; seed and negative_prompt are optional."
            )
        for cells in reader:
            where = f"Line {reader.line_num} of '{path}'"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{where} has {len(cells)} cells, and the header has {len(header)}. Put "
                    "prompts that contain the separator in double quotes."
                )
            row: dict[str, Any] = {
                name: cell.strip()
                for name, cell in zip(header, cells, strict=True)
                if cell.strip() or name in _TEXTS
            }
            if (seed := row.get("seed", "")).isascii() and seed.isdecimal() and len(seed) < 20:
                row["seed"] = int(seed)
            yield where, row
    except csv.Error as error:
        raise UserError(
            f"Line {reader.line_num} of '{path}' is not CSV ({error}). Correct it."
        ) from error


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    text = next((row[name] for name in _TEXTS if name in row), None)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} has no prompt. Add one, or remove the line.")
    seed, negative = row.get("seed"), row.get("negative_prompt")
    if seed is not None and (type(seed) is not int or not 0 <= seed <= LARGEST_SEED):
        raise UserError(
            f"{where} has the seed {seed!r}. Write a whole number from 0 to {LARGEST_SEED}."
        )
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"{where} has a negative_prompt that is no text. Write it in quotes.")
    return Prompt(
        text=one_spaced(text),
        seed=seed,
        negative_prompt=None if negative is None else one_spaced(negative),
    )
