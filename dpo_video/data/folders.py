"""Find the videos of a folder, and name what looks like one and is not read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from dpo_video.data.video import FRAME_SUFFIXES, VIDEO_SUFFIXES, frame_files, natural_key
from dpo_video.types import Skipped

OTHERS = frozenset({
    ".3g2", ".amv", ".apng", ".asf", ".avif", ".bmp", ".divx", ".dng", ".dpx", ".dv", ".exr",
    ".f4v", ".h264", ".h265", ".hdr", ".heic", ".heif", ".hevc", ".ivf", ".j2k", ".jp2", ".jxl",
    ".m2v", ".m3u8", ".mjpeg", ".mjpg", ".mod", ".mxf", ".npy", ".npz", ".nut", ".ogg", ".ogm",
    ".ppm", ".psd", ".qt", ".rm", ".rmvb", ".tif", ".tiff", ".tod", ".vob", ".wtv", ".yuv",
})  # fmt: skip
"""Suffixes of videos and pictures that are not read."""


def not_read(path: Path) -> str:
    """Why an existing file or folder is no video, as the end of a sentence."""
    if path.is_dir():
        return "it is a folder without png or jpg frames, or with videos of its own"
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return "it is hidden, or in a folder that is not read"
    if path.suffix.lower() in FRAME_SUFFIXES:
        return "a single picture is no video"
    return (
        f"files of type {path.suffix or '(none)'} are not read. Convert it to one of "
        f"{', '.join(sorted(VIDEO_SUFFIXES))}"
    )


def count_types(files: Iterable[Path | str]) -> str:
    """How many files there are of each type, such as "2 mp4, 1 webp, 1 folder of frames"."""
    types = Counter(Path(file).suffix.lower() for file in files)
    texts = [f"{types[suffix]} {suffix[1:]}" for suffix in sorted(types.keys() & VIDEO_SUFFIXES)]
    if folders := types.total() - sum(types[suffix] for suffix in VIDEO_SUFFIXES):
        texts.append(f"{folders} folder{'s' * (folders > 1)} of frames")
    return ", ".join(texts)


def find_videos(root: Path, skipped: list[Skipped] | None = None) -> list[str]:
    """Videos and folders of frames under `root`, as relative POSIX paths in natural order.

    Linked folders are followed; one that is read already, as by a link to a parent, is skipped.

    Args:
        root: The folder.
        skipped: Receives what looks like a video and is not read, with the reason.
    """
    names: list[str] = []
    left = [] if skipped is None else skipped
    for here, files in _walk(root, left):
        videos, others = [], Counter[str]()
        for name in files:
            suffix = Path(name).suffix.lower()
            if suffix in VIDEO_SUFFIXES and _storable(here / name, root, left):
                videos.append((here / name).relative_to(root).as_posix())
            elif suffix in OTHERS:
                others[suffix] += 1
        # A single picture is a thumbnail; pictures beside videos are stills of them.
        if not videos and len(frame_files(here)) > 1 and _storable(here, root, left):
            videos = [here.relative_to(root).as_posix()]
        names += videos
        for suffix, count in sorted(others.items()):
            example = next(name for name in files if Path(name).suffix.lower() == suffix)
            which = _shown(here / (example if count == 1 else f"*{suffix}"), root)
            left.append(Skipped(name=which, reason=not_read(here / example)))
    return sorted(names, key=natural_key)


def _walk(root: Path, skipped: list[Skipped]) -> Iterator[tuple[Path, list[str]]]:
    """Every folder once, with the names of its files: linked folders after all real ones."""
    seen: set[tuple[int, int]] = set()
    waiting, linked = [root], list[Path]()
    while waiting or linked:
        folder = (waiting or linked).pop(0)
        try:
            status = folder.stat()
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            reason = f"the folder cannot be read: {error.strerror}"
            skipped.append(Skipped(name=_shown(folder, root), reason=reason))
            continue
        if (status.st_dev, status.st_ino) in seen:
            reason = "it is a link to a folder that is read already"
            skipped.append(Skipped(name=_shown(folder, root), reason=reason))
            continue
        seen.add((status.st_dev, status.st_ino))
        files = []
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if path.is_dir():
                (linked if entry.is_symlink() else waiting).append(path)
            elif entry.is_symlink() and not path.exists():
                reason = "it is a link to nothing"
                skipped.append(Skipped(name=_shown(path, root), reason=reason))
            else:
                files.append(entry.name)
        yield folder, files


def storable(name: str) -> bool:
    """Whether a name is UTF-8, as the files of a pair store are."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _storable(path: Path, root: Path, skipped: list[Skipped]) -> bool:
    """Whether a file's name is UTF-8; otherwise it is skipped."""
    if storable(str(path.relative_to(root))):
        return True
    skipped.append(Skipped(name=_shown(path, root), reason="its name is not UTF-8. Rename it"))
    return False


def _shown(path: Path, root: Path) -> str:
    """The path relative to the root, printable."""
    return path.relative_to(root).as_posix().encode(errors="backslashreplace").decode()
