"""Read video files and folders of frames.

Memory is bounded: frames are sampled and shrunk while they are decoded, and a read that would take
more than `MAX_BYTES` stops with an error. Whatever a file holds, it is either read as a player
shows it, or refused with a VideoError that says why.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from dpo_video.data import films
from dpo_video.data.films import MissedError, Shot, format_of, open_film
from dpo_video.data.fitting import EPSILON
from dpo_video.data.pictures import (
    FRAME_SUFFIXES,
    Picture,
    Size,
    VideoError,
    animation_times,
    load_picture,
    read_animation,
    shrink,
)
from dpo_video.errors import UserError
from dpo_video.support.reading import composed

__all__ = ["FRAME_SUFFIXES", "VideoError"]

VIDEO_SUFFIXES = films.SUFFIXES | {".webp"}
FOLDER_FPS = 8.0  # assumed for a folder of frames
MAX_BYTES = 1 << 30  # decoded frames of one read
MAX_FRAMES = 1 << 16  # of one read: two hours at the rate of most backbones
SEEK_FROM = 1.0  # seconds; decoding a shorter stretch is faster than seeking


class Footage(NamedTuple):
    """Frames at a constant rate."""

    frames: UInt8[Tensor, "3 n y x"]
    fps: float


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """Length and rate of a file, counted from its packets rather than read from its header."""

    frames: int
    fps: float
    """The mean rate."""
    treatments: tuple[str, ...] = ()
    """What is done to its frames, such as "HDR (HLG), converted to SDR"."""

    @property
    def seconds(self) -> float:
        """The duration."""
        return self.frames / self.fps


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sort key that orders frame 9 before frame 10."""
    parts = re.split(r"(\d+)", composed(name).casefold())
    return [int(part) if part.isdecimal() else part for part in parts], name


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder of frames, in natural order; none of one that cannot be read."""
    files: list[Path] = []
    with contextlib.suppress(OSError):
        files = [
            file
            for file in folder.iterdir()
            if file.suffix.lower() in FRAME_SUFFIXES and not file.name.startswith(".")
        ]
    return sorted(files, key=lambda file: natural_key(file.name))


def read_video(
    path: Path,
    *,
    fps: float | None = None,
    start: float = 0.0,
    frames: int | None = None,
    cover: Size | None = None,
    folder_fps: float = FOLDER_FPS,
) -> Footage:
    """Read a video file, or a folder of frames.

    Args:
        path: A file with one of `VIDEO_SUFFIXES`, or a folder of png or jpg files.
        fps: Take the frame nearest to every time `start + k / fps`, by the file's own time stamps;
            None takes all stored frames, at their mean rate.
        start: First time, in seconds.
        frames: Maximum number of frames; None reads to the end.
        cover: Shrink the frames while decoding to the smallest size that covers this height and
            width; frames are never enlarged.
        folder_fps: Rate of a folder of frames.

    Raises:
        VideoError: If there is no such file, it is damaged or of a kind that is not read, or it has
            no frames from `start` on.
        UserError: If the frames would take more than `MAX_BYTES`.
    """
    if start > SEEK_FROM and not path.is_dir():
        with contextlib.suppress(MissedError, VideoError):
            # A file may be readable from its beginning alone.
            return _read(path, fps, start, frames, cover, folder_fps, seek=True)
    return _read(path, fps, start, frames, cover, folder_fps, seek=False)


def _read(
    path: Path,
    fps: float | None,
    start: float,
    frames: int | None,
    cover: Size | None,
    folder_fps: float,
    *,
    seek: bool,
) -> Footage:
    """As `read_video`, from a key frame before `start` or from the beginning."""
    shots = _shots(path, start if seek else 0.0, folder_fps)
    chosen: Iterator[Shot] = (shot for shot in shots if shot.time >= start - EPSILON)
    if fps is not None:
        chosen = _nearest(shots, fps, start)
    pictures: list[Picture] = []
    times: list[float] = []
    used = 0
    for shot in itertools.islice(chosen, frames):
        repeated = bool(times) and shot.time == times[-1]
        picture = pictures[-1] if repeated else shot.picture(cover)
        if pictures and picture.shape != pictures[0].shape:
            raise VideoError(
                f"The frames of {path} differ in size ({_size(pictures[0])} and {_size(picture)}). "
                "Convert it to one size, or remove the odd ones."
            )
        pictures.append(picture)
        times.append(shot.time)
        used += picture.nbytes
        if used > MAX_BYTES or len(pictures) > MAX_FRAMES:
            raise UserError(
                f"{path} takes more than {MAX_BYTES >> 20} MiB or {MAX_FRAMES} frames at its frame "
                f"{len(pictures)}. Request fewer frames or a smaller size."
            )
    if not pictures:
        raise VideoError(f"{path} has no frames after {start:g} s. Remove or replace it.")
    if fps is None:
        span = times[-1] - times[0]
        fps = (len(times) - 1) / span if span > 0 else probe_video(path, folder_fps=folder_fps).fps
    stacked = torch.empty((3, len(pictures), *pictures[0].shape[:2]), dtype=torch.uint8)
    for index, picture in enumerate(pictures):
        stacked[:, index] = torch.tensor(picture).permute(2, 0, 1)
    return Footage(stacked, fps)


def read_picture(path: Path) -> UInt8[Tensor, "3 y x"]:
    """Read a png or a jpg; a VideoError if it is damaged."""
    return torch.tensor(load_picture(path).pixels).permute(2, 0, 1)


def probe_video(
    path: Path, *, seconds: float | None = None, folder_fps: float = FOLDER_FPS
) -> VideoInfo:
    """Count the frames that a player would show; only the first one is decoded.

    Args:
        path: See `read_video`.
        seconds: Stop counting after this time.
        folder_fps: Rate of a folder of frames.

    Raises:
        VideoError: If there is no such file, it is not a video, or its first frame cannot be
            decoded.
    """
    if path.is_dir():
        files = _frames_of(path)
        transparent = load_picture(files[0], (1, 1)).transparent
        return VideoInfo(frames=len(files), fps=folder_fps, treatments=_over_black(transparent))
    kind = format_of(path)
    if kind == "webp":
        first = next(read_animation(path, (1, 1)))
        times = animation_times(path)
        return VideoInfo(
            frames=max(len(times) - 1, 1),
            fps=(len(times) - 1) / times[-1] if times[-1] else FOLDER_FPS,
            treatments=_over_black(first.transparent),
        )
    times = []
    decoded = False
    with open_film(path, kind) as film:
        for time, decoded in film.packets():
            if time is not None:
                times.append(time)
            if decoded and seconds is not None and times and times[-1] - times[0] > seconds:
                break
        rate = float(film.stream.average_rate or film.stream.guessed_rate or 0)
        if not decoded or not times:
            raise VideoError(f"{path} holds no frames. Remove or replace it.")
        span = max(times) - min(times)
        if span > 0:
            rate = (len(times) - 1) / span
        return VideoInfo(frames=len(times), fps=rate or FOLDER_FPS, treatments=film.treatments)


def _over_black(transparent: bool) -> tuple[str, ...]:
    return (films.TRANSPARENT,) if transparent else ()


def _frames_of(folder: Path) -> list[Path]:
    """The pictures of a folder of frames, which must be of one kind."""
    files = frame_files(folder)
    if not files:
        raise VideoError(f"{folder} holds no png or jpg frames. Remove it or fill it.")
    kinds = {file.suffix.lower().replace("jpeg", "jpg") for file in files}
    if len(kinds) > 1:
        raise VideoError(
            f"{folder} holds png and jpg pictures, so it is unclear which are its frames. Move the "
            "others elsewhere."
        )
    return files


def _nearest(shots: Iterator[Shot], fps: float, start: float) -> Iterator[Shot]:
    """The shots nearest to the times `start + k / fps`, up to the end of the last shot."""
    k, gap = 0, 1 / fps
    last: Shot | None = None
    for shot in shots:
        if last is not None:
            gap = shot.time - last.time
            while start + k / fps < last.time + gap / 2 - EPSILON:
                yield last
                k += 1
        last = shot
    while last is not None and start + k / fps < last.time + gap - EPSILON:
        yield last
        k += 1


def _shots(path: Path, start: float, folder_fps: float) -> Iterator[Shot]:
    """A file's frames in order, from a key frame before `start`; times since its beginning, s.

    Raises:
        MissedError: If no such key frame is found.
    """
    if path.is_dir():
        for index, file in enumerate(_frames_of(path)):
            yield Shot(time=index / folder_fps, picture=partial(_still, file))
        return
    kind = format_of(path)
    if kind == "webp":
        yield from _animated(path)
        return
    with open_film(path, kind) as film:
        yield from film.shots(start)


def _still(file: Path, cover: Size | None) -> Picture:
    return load_picture(file, cover).pixels


def _animated(path: Path) -> Iterator[Shot]:
    """The frames of an animated WebP, decoded in order, each once and whole."""
    budget = films.MAX_DECODED
    for time, still in zip([*animation_times(path), 0.0], read_animation(path), strict=False):
        budget -= still.pixels.size // 3
        if budget < 0:
            raise VideoError(f"{path} takes too long to decode. Cut or shrink it.")
        yield Shot(time=time, picture=partial(shrink, still.pixels))


def _size(picture: Picture) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
