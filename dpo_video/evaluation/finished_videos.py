"""Finished videos of two models in two folders, paired by their names."""

from __future__ import annotations

from pathlib import Path

from dpo_video.data.video import VIDEO_SUFFIXES, Footage, natural_key, read_video
from dpo_video.errors import UserError
from dpo_video.support.formatting import counted
from dpo_video.support.reading import one_spaced, read_text

_SAME_RATE = 0.01  # relative difference of frame rates that is none


def paired_videos(base: Path, tuned: Path) -> list[tuple[Path, Path]]:
    """The files of both folders, in the order of their names.

    Raises:
        UserError: if a folder is missing, the names differ, there are fewer than two pairs, or the
            two videos of a pair differ in size, length or frame rate.
    """
    sides = [_by_name(folder) for folder in (base, tuned)]
    if odd := sorted(sides[0].keys() ^ sides[1].keys(), key=natural_key):
        where = base if odd[0] in sides[0] else tuned
        raise UserError(
            f"{len(odd)} videos are in one folder only, '{odd[0]}' of '{where}' first. Give both "
            "videos of a pair the same name."
        )
    names = sorted(sides[0], key=natural_key)
    if len(names) < 2:
        raise UserError(
            f"'{base}' holds {counted(len(names), 'video')}, and an evaluation needs two or more "
            "of each model."
        )
    pairs = [(sides[0][name], sides[1][name]) for name in names]
    for first, second in pairs:
        if differences := _differences(read_video(first), read_video(second)):
            raise UserError(
                f"The videos '{first}' and '{second}' differ in {' and '.join(differences)}. "
                "Export both alike: the metrics depend on it."
            )
    return pairs


def _differences(base: Footage, tuned: Footage) -> list[str]:
    """What the videos of a pair differ in, in words with both values."""
    (frames, height, width), others = base.frames.shape[1:], tuned.frames.shape[1:]
    found = []
    if others[1:] != (height, width):
        found.append(f"width x height ({width}x{height} and {others[2]}x{others[1]})")
    if others[0] != frames:
        found.append(f"length ({frames} and {others[0]} frames)")
    if abs(base.fps - tuned.fps) > _SAME_RATE * base.fps:
        found.append(f"frame rate ({base.fps:.4g} and {tuned.fps:.4g} fps)")
    return found


def caption_of(*files: Path) -> str:
    """The text of NAME.txt beside a file, or its name in words."""
    for file in files:
        caption = file.with_suffix(".txt")
        if caption.is_file() and (text := one_spaced(read_text(caption))):
            return text
    return one_spaced(files[0].stem.replace("_", " ").replace("-", " "))


def _by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder. Name one that holds videos.")
    return {
        file.stem: file
        for file in folder.iterdir()
        if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file()
    }
