"""Captions of clips: from metadata.jsonl, or from a text file beside a video."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from dpo_video.errors import UserError
from dpo_video.support.reading import (
    composed,
    decomposed,
    one_spaced,
    parse_json,
    read_lines,
    read_text,
)
from dpo_video.types import Remark

METADATA = "metadata.jsonl"
COLUMNS = "Columns that are not read"


def read_caption(path: Path) -> str | None:
    """The caption in a text file beside a video, if there is one."""
    name = f"{path.name if path.is_dir() else path.stem}.txt"
    file = next(
        (
            path.parent / form
            for form in dict.fromkeys((name, composed(name), decomposed(name)))
            if (path.parent / form).is_file()
        ),
        None,
    )
    if file is None:
        return None
    try:
        return one_spaced(read_text(file))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}. Save it as UTF-8 text."
        ) from error


def read_metadata(path: Path, remarks: list[Remark]) -> dict[str, str] | None:
    """Captions of a metadata.jsonl by relative path, in Unicode's form NFC; None without a file."""
    if not path.exists():
        return None
    captions: dict[str, str] = {}
    columns: set[str] = set()
    try:
        for number, line in read_lines(path):
            name, text, others = _read_line(line, f"Line {number} of {path}")
            if name in captions:
                raise UserError(
                    f"Line {number} of {path} names {name} again. Remove one of the two."
                )
            captions[name] = text
            columns |= others
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. Save it as UTF-8 text."
        ) from error
    remarks += unread_columns(path.name, columns)
    return captions


def unread_columns(name: str, columns: set[str]) -> list[Remark]:
    """The remark on columns of a list that nothing reads."""
    if not columns:
        return []
    return [Remark(what=COLUMNS, name=name, detail=", ".join(sorted(columns)))]


def _read_line(line: str, where: str) -> tuple[str, str, set[str]]:
    """File, caption and the names of other columns."""
    wanted = 'Write it as {"file_name": "clip.mp4", "text": "its caption"}.'
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}). {wanted}") from error
    name, text = (
        (entry.get("file_name"), entry.get("text")) if isinstance(entry, dict) else (None, None)
    )
    if not (isinstance(name, str) and name.strip() and isinstance(text, str) and text.strip()):
        raise UserError(f"{where} lacks a file_name or a text. {wanted}")
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or PureWindowsPath(name).drive:
        raise UserError(
            f"{where} names {name}, which is outside the folder. "
            "Move the file into it, and name it relative to the folder."
        )
    return composed(relative.as_posix()), one_spaced(text), entry.keys() - {"file_name", "text"}
