"""A folder of captioned videos as clips of the backbone's shape.

Opening it counts frames and decodes one frame per file; clips are decoded on demand.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from dpo_video.data.captions import METADATA, read_caption, read_metadata
from dpo_video.data.fitting import fit_video, fits
from dpo_video.data.folders import count_types, find_videos, not_read
from dpo_video.data.scene_cuts import find_cuts
from dpo_video.data.video import (
    VIDEO_SUFFIXES,
    VideoError,
    VideoInfo,
    frame_files,
    probe_video,
    read_video,
)
from dpo_video.errors import UserError
from dpo_video.support.reading import Names, composed
from dpo_video.support.rng import generator
from dpo_video.types import Clip, Remark, Skipped, Video, VideoShape

WINDOWS = 8  # most clips cut from one file, so that a long film does not dominate
NOTICED = 1.02  # times; a smaller change of speed is not reported
SLOWED = "Slowed down, because it is shorter than the clip"
CAPTIONING = (
    f"Caption it by a line in {METADATA} ({{file_name, text}}), "
    "by a text file of the same name beside it, or caption all clips with --prompt."
)


@dataclass(frozen=True, kw_only=True)
class _Window:
    """A clip's position in its file."""

    file: str
    caption: str
    size: int
    """Size of the file, bytes."""
    start: float
    """Seconds."""
    only: bool
    """Whether it is the file's only clip."""
    spread: bool
    """Whether the file is slowed down, because it is shorter than a clip."""


class ClipFolder(Sequence[Clip]):
    """The clips of a folder by index; the order depends on names alone."""

    def __init__(
        self,
        root: Path,
        shape: VideoShape,
        windows: Sequence[_Window],
        skipped: list[Skipped],
        remarks: Sequence[Remark],
        *,
        scene_cuts: bool,
    ) -> None:
        """Use `open_clips`."""
        self.root = root
        self.shape = shape
        self.skipped = skipped
        """Files and clips that are not used; grows when `cycle` or iteration decodes one."""
        self.remarks = remarks
        """On files that are shown otherwise than they were filmed, and on metadata.jsonl."""
        self._windows = tuple(windows)
        self._order = _spread_order(self._windows)
        self._scene_cuts = scene_cuts
        self._left_out: set[int] = set()

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Clip:  # type: ignore[override] # no slices
        """Decode a clip.

        Raises:
            VideoError: If the file is damaged beyond the part that `open_clips` read.
        """
        window, shape = self._windows[index], self.shape
        video = _decode(self.root / window.file, shape, window.start, window.spread)
        return Clip(name=self.name(index), caption=window.caption, video=video)

    def __iter__(self) -> Iterator[Clip]:
        """All clips that can be used; the others are added to `skipped`."""
        clips = (self._try(index) for index in range(len(self)))
        return (clip for clip in clips if clip is not None)

    def cycle(self, index: int) -> Clip:
        """Clip `index` of an endless sequence that is spread over the files.

        It has the first window of every file, in an order of which each beginning is spread over
        the names, then the second windows, and so on, and starts over after the last one. A clip
        that is damaged or has a scene cut is added to `skipped` and replaced by any of the others,
        drawn anew at each index.

        Raises:
            VideoError: If no clip can be used.
        """
        clip = self._try(self._order[index % len(self)])
        if clip is not None:
            return clip
        for other in torch.randperm(len(self), generator=generator(index, "gap")).tolist():
            if (clip := self._try(other)) is not None:
                return clip
        raise VideoError(f"No clip of {self.root} can be used. {self.skipped[-1].reason}")

    def _try(self, index: int) -> Clip | None:
        if index in self._left_out:
            return None
        try:
            clip = self[index]
            assert clip.video is not None
            if self._scene_cuts or not (cuts := find_cuts(clip.video)):
                return clip
            reason = (
                f"it has a scene cut after {cuts[0] / self.shape.fps:.2f} s. Cut it there, or use "
                "it as it is: --set run.scene_cuts=true"
            )
        except VideoError as error:
            reason = str(error)
        self._left_out.add(index)
        self.skipped.append(Skipped(name=self.name(index), reason=reason))
        return None

    def name(self, index: int) -> str:
        """The file's path in the folder, with `#t=START,END` in seconds if it has several clips."""
        window = self._windows[index]
        end = window.start + self.shape.frames / self.shape.fps
        return window.file if window.only else f"{window.file}#t={window.start:g},{end:g}"

    @property
    def contents(self) -> str:
        """The files by type, such as "2 mp4, 1 webp"."""
        return count_types({window.file for window in self._windows})

    @property
    def fingerprint(self) -> str:
        """A hash of names, sizes, captions, windows and the shape.

        It does not depend on the folder's location. A changed file of equal size is not detected.
        """
        shape = self.shape
        content = {
            "shape": [shape.frames, shape.height, shape.width, shape.fps],
            "clips": [[w.file, w.size, w.caption, w.start] for w in self._windows],
            "scene_cuts": self._scene_cuts,
            "order": 2,  # of `cycle`
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _spread_order(windows: Sequence[_Window]) -> list[int]:
    """Indices of all windows: the first ones of all files, the second ones, and so on.

    Within a round the files come in bit-reversed order (van der Corput), so that any number of them
    is spread over the names.
    """
    rounds: list[tuple[int, int]] = []
    files: dict[str, int] = {}
    seen: Counter[str] = Counter()
    for window in windows:
        number = files.setdefault(window.file, len(files))
        rounds.append((seen[window.file], int(f"{number:032b}"[::-1], 2)))
        seen[window.file] += 1
    return sorted(range(len(windows)), key=rounds.__getitem__)


def open_clips(
    folder: Path,
    shape: VideoShape,
    prompt: str | None = None,
    *,
    windows: int = WINDOWS,
    slow_down: bool = False,
    scene_cuts: bool = False,
) -> ClipFolder:
    """List the clips of a folder, or of a single video.

    Videos and folders of frames (png or jpg, played at the shape's rate) are found at any depth. A
    caption comes from `metadata.jsonl`, else from `NAME.txt` beside the file, else from `prompt`.
    If there is a `metadata.jsonl`, files without a caption are skipped rather than an error.

    Args:
        folder: The folder or video.
        shape: The backbone's shape.
        prompt: Caption of files that have none.
        windows: Most clips that a long file is cut into, one after the other.
        slow_down: Use files that are shorter than a clip and have enough frames, slowed down.
        scene_cuts: Use clips with a scene cut.

    Raises:
        UserError: If there is no such folder, it has no clips, a clip has no caption, or
            `metadata.jsonl` is malformed.
    """
    if not folder.exists():
        raise UserError(f"There is no folder {folder}. Check the path after --clips.")
    single = folder.is_file()
    if not single and not folder.is_dir():
        raise UserError(f"{folder} is neither a folder nor a file. Name a folder of videos.")
    if single and folder.suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(
            f"{folder} is not a readable video. Name a folder of videos, or a file of type "
            f"{', '.join(sorted(VIDEO_SUFFIXES))}."
        )
    root = folder.parent if single else folder
    skipped: list[Skipped] = []
    remarks: list[Remark] = []
    captions = read_metadata(root / METADATA, remarks)
    names = [folder.name] if single else find_videos(root, skipped)
    if captions is not None and not single:
        skipped += _missing(root, captions, names, skipped)
    found: list[_Window] = []
    for name in names:
        try:
            starts, spread, info = _cut(root / name, shape, windows, slow_down, "run")
        except VideoError as error:
            skipped.append(Skipped(name=name, reason=str(error)))
            continue
        caption = (captions or {}).get(composed(name)) or read_caption(root / name) or prompt
        if not caption:
            if captions is None or single:
                raise UserError(f"{root / name} has no caption. {CAPTIONING}")
            reason = f"neither {METADATA} nor a text file beside it has its caption"
            skipped.append(Skipped(name=name, reason=reason))
            continue
        size, only = stored_bytes(root / name), len(starts) == 1
        found += [
            _Window(file=name, caption=caption, size=size, start=start, only=only, spread=spread)
            for start in starts
        ]
        remarks += _remarks(name, info, _slower(info, shape) if spread else 1.0)
    if not found:
        why = f" For example {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise UserError(
            f"{folder} has no usable clip: all {len(names)} videos are skipped.{why}"
            if names
            else f"{folder} holds no videos. Put some there, or folders of png or jpg frames.{why}"
        )
    return ClipFolder(root, shape, found, skipped, remarks, scene_cuts=scene_cuts)


def _missing(
    root: Path, captions: dict[str, str], names: Sequence[str], skipped: Sequence[Skipped]
) -> list[Skipped]:
    """Files that the metadata names and that are no videos, unless they are named already."""
    known = {composed(name) for name in names} | {composed(each.name) for each in skipped}
    files = Names(root)
    return [
        Skipped(
            name=name,
            reason=f"{METADATA} names it, but there is no such video"
            if (path := files.find(name)) is None
            else f"{METADATA} names it, but {not_read(path)}",
        )
        for name in captions
        if name not in known
    ]


class Beginning(NamedTuple):
    """The beginning of a video at a backbone's shape."""

    video: Video
    slower: float
    """How many times slower than it was filmed: 1 unless it is shorter than the clip."""
    remarks: list[Remark]


def read_beginning(path: Path, shape: VideoShape, *, slow_down: bool = False) -> Beginning:
    """Read the beginning of a video or of a folder of frames.

    Args:
        path: The file or folder.
        shape: The backbone's shape.
        slow_down: Slow down a video that is too short and has enough frames.

    Raises:
        VideoError: If there is no such file, or it is damaged or too short.
    """
    _, spread, info = _cut(path, shape, 1, slow_down, "pairs")
    slower = _slower(info, shape) if spread else 1.0
    remarks = _remarks(f"{path.parent.name}/{path.name}", info, slower)
    return Beginning(_decode(path, shape, 0.0, spread), slower, remarks)


def _slower(info: VideoInfo, shape: VideoShape) -> float:
    return shape.frames / shape.fps / info.seconds


def _remarks(name: str, info: VideoInfo, slower: float) -> list[Remark]:
    """What is to be known about a file that is used."""
    found = [Remark(what=what, name=name) for what in info.treatments]
    if slower > NOTICED:
        detail = (
            f"{info.seconds:.2f} s is stretched to {info.seconds * slower:.2f} s, "
            f"{slower:.3g} times slower"
        )
        found.append(Remark(what=SLOWED, name=name, detail=detail))
    return found


def _decode(path: Path, shape: VideoShape, start: float, spread: bool) -> Video:
    footage = read_video(
        path,
        fps=None if spread else shape.fps,
        start=start,
        frames=None if spread else shape.frames,
        cover=(shape.height, shape.width),
        folder_fps=shape.fps,
    )
    try:
        return fit_video(footage.frames, footage.fps, shape)
    except UserError as error:
        raise VideoError(f"{path.name}: {error}") from error


def _cut(
    path: Path, shape: VideoShape, windows: int, slow_down: bool, table: str
) -> tuple[list[float], bool, VideoInfo]:
    """Start times of a file's clips in seconds, whether it is slowed down, and its length.

    `table` is the one that has the option `slow_down`.

    Raises:
        VideoError: If it is damaged or too short.
    """
    length = shape.frames / shape.fps
    # One second more covers the end of the last window, and the rate of a short file.
    info = probe_video(path, seconds=windows * length + 1, folder_fps=shape.fps)
    starts = [
        k * length
        for k in range(windows)
        if k == 0 or info.seconds >= (k + 1) * length - 0.5 / shape.fps
    ]
    if fits(info.frames, info.fps, shape):
        return starts, False, info
    reason = f"too short: it lasts {info.seconds:.2f} s, and {length:.2f} s are needed"
    if info.frames < shape.frames:
        raise VideoError(f"{reason}.")
    if not slow_down:
        slower = f"{_slower(info, shape):.3g} times slower: --set {table}.slow_down=true"
        raise VideoError(f"{reason}. Use a longer one, or show it {slower}")
    return [0.0], True, info


def stored_bytes(path: Path) -> int:
    """Size of a file or of a folder of frames; a link to nothing has none."""
    total = 0
    for file in frame_files(path) if path.is_dir() else [path]:
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total
