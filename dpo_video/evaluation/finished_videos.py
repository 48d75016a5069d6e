"""Finished videos of two models in two folders, paired by their names."""

from __future__ import annotations

from pathlib import Path

from dpo_video.data.video import VIDEO_SUFFIXES, natural_key, read_video
from dpo_video.errors import UserError
from dpo_video.support.formatting import counted
from dpo_video.support.reading import one_spaced, read_text


def paired_videos(base: Path, tuned: Path) -> list[tuple[Path, Path]]:
    """The files of both folders, in the order of their names.

    Raises:
        UserError: if a folder is missing, the names differ, there are fewer than two pairs, or the
            two videos of a pair differ in size or length.
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
        shapes = [tuple(read_video(file).frames.shape[1:]) for file in (first, second)]
        if shapes[0] != shapes[1]:
            (frames, height, width), other = shapes[0], shapes[1]
            raise UserError(
                f"'{first.name}' has {frames} frames of {height}x{width} in '{base}', and "
                f"{other[0]} of {other[1]}x{other[2]} in '{tuned}'. The metrics depend on both: "
                "export both videos alike."
            )
    return pairs


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
