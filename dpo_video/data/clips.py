"""A folder of captioned videos as clips of the backbone's shape.

Opening it counts frames and decodes one frame per file; clips are decoded on demand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from dpo_video.data.video import (
    VIDEO_SUFFIXES,
    VideoError,
    fit_video,
    fits,
    frame_files,
    natural_key,
    probe_video,
    read_video,
    too_short,
)
from dpo_video.errors import UserError
from dpo_video.types import Clip, Skipped, Video, VideoShape

METADATA = "metadata.jsonl"
WINDOWS = 8  # most clips cut from one file, so that a long film does not dominate
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
    """Whether the file is sped up, because it is too short at the backbone's frame rate."""


class ClipFolder(Sequence[Clip]):
    """The clips of a folder by index; the order depends on names alone."""

    def __init__(
        self, root: Path, shape: VideoShape, windows: Sequence[_Window], skipped: list[Skipped]
    ) -> None:
        """Use `open_clips`."""
        self.root = root
        self.shape = shape
        self.skipped = skipped
        """Files without a usable clip; grows when `cycle` or iteration finds a damaged one."""
        self._windows = tuple(windows)

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
        """All clips that can be decoded; the others are added to `skipped`."""
        clips = (self._try(index) for index in range(len(self)))
        return (clip for clip in clips if clip is not None)

    def cycle(self, index: int) -> Clip:
        """Clip `index` modulo the number of clips.

        A clip that cannot be decoded is added to `skipped` and replaced by the next one that can.

        Raises:
            VideoError: If no clip can be decoded.
        """
        for step in range(len(self)):
            clip = self._try((index + step) % len(self))
            if clip is not None:
                return clip
        raise VideoError(f"No clip of {self.root} can be decoded. {self.skipped[-1].reason}")

    def _try(self, index: int) -> Clip | None:
        try:
            return self[index]
        except VideoError as error:
            damaged = Skipped(name=self.name(index), reason=str(error))
            if damaged not in self.skipped:
                self.skipped.append(damaged)
            return None

    def name(self, index: int) -> str:
        """The file's path in the folder, with `#t=START,END` in seconds if it has several clips."""
        window = self._windows[index]
        end = window.start + self.shape.frames / self.shape.fps
        return window.file if window.only else f"{window.file}#t={window.start:g},{end:g}"

    @property
    def fingerprint(self) -> str:
        """A hash of names, sizes, captions, windows and the shape.

        It does not depend on the folder's location. A changed file of equal size is not detected.
        """
        shape = self.shape
        content = {
            "shape": [shape.frames, shape.height, shape.width, shape.fps],
            "clips": [[w.file, w.size, w.caption, w.start] for w in self._windows],
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def open_clips(
    folder: Path, shape: VideoShape, prompt: str | None = None, *, windows: int = WINDOWS
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

    Raises:
        UserError: If there is no such folder, it has no clips, a clip has no caption, or
            `metadata.jsonl` is malformed.
    """
    if not folder.exists():
        raise UserError(f"There is no folder {folder}. Check the path after --clips.")
    single = folder.is_file()
    if single and folder.suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(
            f"{folder} is not a readable video. Name a folder of videos, or a file of type "
            f"{', '.join(sorted(VIDEO_SUFFIXES))}."
        )
    root = folder.parent if single else folder
    captions = _read_metadata(root / METADATA)
    names = [folder.name] if single else find_videos(root)
    skipped = [
        Skipped(name=name, reason=f"{METADATA} names it, but there is no such video")
        for name in captions or ()
        if name not in names and not single
    ]
    found: list[_Window] = []
    for name in names:
        try:
            starts, spread = _cut(root / name, shape, windows)
        except VideoError as error:
            skipped.append(Skipped(name=name, reason=str(error)))
            continue
        caption = (captions or {}).get(name) or read_caption(root / name) or prompt
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
    if not found:
        why = f" For example {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise UserError(
            f"{folder} has no usable clip: all {len(names)} videos are skipped.{why}"
            if names
            else f"{folder} holds no videos. Put some there, or folders of png or jpg frames."
        )
    return ClipFolder(root, shape, found, skipped)


def read_beginning(path: Path, shape: VideoShape) -> Video:
    """The beginning of a video or of a folder of frames, at a backbone's shape.

    Raises:
        UserError: If there is no such file.
        VideoError: If it is damaged or too short.
    """
    _, spread = _cut(path, shape, 1)
    return _decode(path, shape, 0.0, spread)


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


def find_videos(root: Path) -> list[str]:
    """Videos and folders of frames under `root`, as relative POSIX paths in natural order."""
    names = []
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(parent)
        videos = [
            (here / name).relative_to(root).as_posix()
            for name in files
            if Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(".")
        ]
        # A single picture is a thumbnail; pictures beside videos are stills of them.
        if not videos and len(frame_files(here)) > 1:
            videos = [here.relative_to(root).as_posix()]
        names += videos
    return sorted(names, key=natural_key)


def _cut(path: Path, shape: VideoShape, windows: int) -> tuple[list[float], bool]:
    """Start times of a file's clips in seconds, and whether it is sped up.

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
        return starts, False
    if info.frames >= shape.frames:
        return [0.0], True
    raise VideoError(f"too short: {too_short(info.frames, info.fps, shape)}.")


def stored_bytes(path: Path) -> int:
    """Size of a file or of a folder of frames."""
    files = frame_files(path) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def read_caption(path: Path) -> str | None:
    """The caption in a text file beside a video, if there is one."""
    file = path.parent / f"{path.name if path.is_dir() else path.stem}.txt"
    if not file.is_file():
        return None
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text. Save it as UTF-8.") from error


def _read_metadata(path: Path) -> dict[str, str] | None:
    """Captions by relative path; None without a file."""
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text. Save it as UTF-8.") from error
    captions: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, text = _read_line(line, f"Line {number} of {path}")
        if name in captions:
            raise UserError(f"Line {number} of {path} names {name} again. Remove one of the two.")
        captions[name] = text
    return captions


def _read_line(line: str, where: str) -> tuple[str, str]:
    wanted = 'Write it as {"file_name": "clip.mp4", "text": "its caption"}.'
    try:
        entry = json.loads(line)
        json.dumps(entry, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON. {wanted}") from error
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
    return relative.as_posix(), " ".join(text.split())
