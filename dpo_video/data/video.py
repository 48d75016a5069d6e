"""Read video files and resample them to a backbone's shape.

Memory is bounded: frames are sampled and shrunk while they are decoded, and a read that would take
more than `MAX_BYTES` stops with an error.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import Interpolation
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dpo_video.errors import UserError
from dpo_video.types import Video, VideoShape

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".webm", ".avi", ".mov", ".mkv", ".gif"})
FRAME_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
FOLDER_FPS = 8.0  # assumed for a folder of frames
MAX_BYTES = 1 << 30  # decoded frames of one read
MAX_PIXELS = 1 << 26  # one frame: twice 8K
SEEK_FROM = 1.0  # seconds; decoding a shorter stretch is faster than seeking
EPSILON = 1e-6  # seconds; tolerates the rounding of time stamps

Picture = NDArray[np.uint8]
Size = tuple[int, int]


class VideoError(UserError):
    """A file that is no video, is damaged, or holds no frames."""


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

    @property
    def seconds(self) -> float:
        """The duration."""
        return self.frames / self.fps


# --- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Shot:
    """A decoded frame before its conversion to RGB."""

    time: float
    picture: Callable[[Size | None], Picture]


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sort key that orders frame 9 before frame 10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if part.isdecimal() else part for part in parts], name


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder of frames, in natural order."""
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
        path: An mp4, webm, avi, mov, mkv or gif; or a folder of png or jpg files.
        fps: Take the frame nearest to every time `start + k / fps`, by the file's own time stamps;
            None takes all stored frames, at their mean rate.
        start: First time, in seconds.
        frames: Maximum number of frames; None reads to the end.
        cover: Shrink the frames while decoding to the smallest size that covers this height and
            width; frames are never enlarged.
        folder_fps: Rate of a folder of frames.

    Raises:
        VideoError: If the file is damaged, or has no frames from `start` on.
        UserError: If there is no such file, or the frames would take more than `MAX_BYTES`.
    """
    shots = _shots(path, start, folder_fps)
    chosen: Iterator[_Shot] = (shot for shot in shots if shot.time >= start - EPSILON)
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
        if used > MAX_BYTES:
            raise UserError(
                f"{path} takes more than {MAX_BYTES >> 20} MiB at its frame {len(pictures)}. "
                "Request fewer frames or a smaller size."
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
    return torch.tensor(_load(path, None)).permute(2, 0, 1)


def probe_video(
    path: Path, *, seconds: float | None = None, folder_fps: float = FOLDER_FPS
) -> VideoInfo:
    """Count a video's frames by their time stamps; only the first frame is decoded.

    Args:
        path: See `read_video`.
        seconds: Stop counting after this time.
        folder_fps: Rate of a folder of frames.

    Raises:
        VideoError: If the file is not a video, or its first frame cannot be decoded.
        UserError: If there is no such file.
    """
    _must_exist(path)
    if path.is_dir():
        files = frame_files(path)
        if not files:
            raise VideoError(f"{path} holds no png or jpg frames. Remove it or fill it.")
        _load(files[0], (1, 1))
        return VideoInfo(frames=len(files), fps=folder_fps)
    times: list[float] = []
    decoded = False
    with _opened(path) as (container, stream):
        for packet in container.demux(stream):
            if not decoded:
                decoded = bool(packet.decode())
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None and packet.size:
                times.append(float(stamp * packet.time_base))
            if decoded and seconds is not None and times and times[-1] - times[0] > seconds:
                break
        rate = float(stream.average_rate or stream.guessed_rate or 0)
    if not decoded or not times:
        raise VideoError(f"{path} holds no frames. Remove or replace it.")
    span = max(times) - min(times)
    if span > 0:
        rate = (len(times) - 1) / span
    return VideoInfo(frames=len(times), fps=rate or FOLDER_FPS)


def _nearest(shots: Iterator[_Shot], fps: float, start: float) -> Iterator[_Shot]:
    """The shots nearest to the times `start + k / fps`, up to the end of the last shot."""
    k, gap = 0, 1 / fps
    last: _Shot | None = None
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


def _shots(path: Path, start: float, folder_fps: float) -> Iterator[_Shot]:
    """A file's frames in order, from `start` or earlier; times in seconds since its beginning."""
    _must_exist(path)
    if path.is_dir():
        for index, file in enumerate(frame_files(path)):
            yield _Shot(time=index / folder_fps, picture=partial(_load, file))
        return
    for seek in (True, False) if start > SEEK_FROM else (False,):
        with _opened(path) as (container, stream):
            origin = None if stream.start_time is None else stream.start_time * stream.time_base
            if seek:
                with contextlib.suppress(av.FFmpegError):
                    container.seek(int(((origin or 0) + Fraction(start)) / stream.time_base),
                                   stream=stream)  # fmt: skip
            missed = False
            for index, frame in enumerate(container.decode(stream)):
                if frame.pts is None:  # raw streams have no time stamps and no seeking
                    time = Fraction(index) / (stream.average_rate or Fraction(FOLDER_FPS))
                    missed = seek
                else:
                    time = frame.pts * frame.time_base
                    origin = time if origin is None else origin
                    time -= origin
                    missed = missed or (seek and index == 0 and time > start)
                if missed:
                    break
                if frame.is_corrupt:
                    raise VideoError(_damaged(path, f"after {float(time):.1f} s"))
                yield _Shot(time=float(time), picture=_renderer(frame, stream))
            if not missed:
                return


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A file's container and first video stream."""
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video. Remove or replace it.")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoError(_damaged(path, "(no installed decoder reads it)"))
            # A frame's header may declare a larger size than the file's header.
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(_damaged(path, f"({error.strerror})")) from error


def _damaged(path: Path, where: str) -> str:
    return f"{path} is damaged or not a video {where}. Remove, replace or re-encode it."


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise UserError(f"There is no file {path}. Check the path.")


def _renderer(frame: Any, stream: Any) -> Callable[[Size | None], Picture]:
    def render(cover: Size | None) -> Picture:
        turns = round(frame.rotation / 90) % 4  # phones store their orientation
        aspect = float(stream.sample_aspect_ratio or 1)  # DV and DVD pixels are not square
        width = max(round(frame.width * aspect), 1)
        upright = (width, frame.height) if turns % 2 else (frame.height, width)
        height, width = _shrunk(*upright, cover)
        if turns % 2:
            height, width = width, height
        rgb = frame.reformat(
            width=width, height=height, format="rgb24",
            interpolation=Interpolation.AREA,
        ).to_ndarray()  # fmt: skip
        return np.ascontiguousarray(np.rot90(rgb, turns))

    return render


def _load(file: Path, cover: Size | None) -> Picture:
    try:
        with Image.open(file) as stored:
            image = ImageOps.exif_transpose(stored).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{file} is damaged or not a picture. Remove or replace it.") from error
    height, width = _shrunk(image.height, image.width, cover)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(image)


def _shrunk(height: int, width: int, cover: Size | None) -> Size:
    """The smallest size at the same aspect that covers `cover`; never larger than the picture."""
    if cover is None:
        return height, width
    scale = max(cover[0] / height, cover[1] / width)
    if scale >= 1:
        return height, width
    return max(round(height * scale), cover[0]), max(round(width * scale), cover[1])


def _size(picture: Picture) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"


# --- fitting ---------------------------------------------------------------------------------


def fit_video(
    frames: UInt8[Tensor, "3 n y x"] | Float[Tensor, "3 n y x"],
    fps: float,
    shape: VideoShape,
    start: float = 0.0,
) -> Video:
    """Resample in time, resize to cover the shape and crop the centre.

    Takes the frames nearest to the times `start + k / shape.fps`. A video that is too short for
    that, but has at least `shape.frames` frames, is sped up: evenly spaced frames are taken.

    Args:
        frames: Bytes, or floats in [0, 1].
        fps: Rate of `frames`.
        shape: Shape and rate of the result.
        start: First time, in seconds.

    Raises:
        UserError: If the video is too short.
    """
    picked = frames[:, _pick(frames.shape[1], fps, shape, start)]
    pixels = picked / 255.0 if picked.dtype == torch.uint8 else picked.float()
    height, width = pixels.shape[2:]
    scale = max(shape.height / height, shape.width / width)
    size = (max(round(height * scale), shape.height), max(round(width * scale), shape.width))
    if size != (height, width):
        pixels = F.interpolate(
            pixels.transpose(0, 1), size, mode="bilinear", antialias=True, align_corners=False
        ).transpose(0, 1)
    top, left = (size[0] - shape.height) // 2, (size[1] - shape.width) // 2
    cut = pixels[:, :, top : top + shape.height, left : left + shape.width]
    return cut.clamp(0, 1).contiguous()


def fits(frames: int, fps: float, shape: VideoShape) -> bool:
    """Whether this many frames at `fps` last until the last frame of `shape` is due."""
    return (shape.frames - 1) / shape.fps < frames / fps - EPSILON


def too_short(frames: int, fps: float, shape: VideoShape) -> str:
    """A clause with a video's actual and required length."""
    return (
        f"it has {frames / fps:.2f} s ({frames} frames), "
        f"and {shape.frames / shape.fps:.2f} s or {shape.frames} frames are needed"
    )


def _pick(available: int, fps: float, shape: VideoShape, start: float) -> Tensor:
    """Indices of the frames to take."""
    first = math.floor(start * fps + 0.5 + EPSILON)
    left = max(available - first, 0)
    if fits(left, fps, shape):
        instants = start + torch.arange(shape.frames, dtype=torch.float64) / shape.fps
        return (instants * fps + 0.5 + EPSILON).floor().long().clamp(max=available - 1)
    if left >= shape.frames:
        return first + torch.linspace(0, left - 1, shape.frames, dtype=torch.float64).round().long()
    raise UserError(
        f"The video is too short: {too_short(left, fps, shape)}. "
        "Use a longer one, or a backbone with fewer frames."
    )
