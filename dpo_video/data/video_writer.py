"""Write videos as mp4, gif, webp or a png sheet, atomically and with reproducible bytes.

Pictures and animations are encoded by imageio. An mp4 is encoded by PyAV, because imageio's plugin
for it sets neither the quality nor the colour tags nor the number of threads (`docs/design.md`).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace, Interpolation
from imageio.v3 import imwrite
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from dpo_video.errors import UserError
from dpo_video.support.atomic import sync
from dpo_video.types import Video

Frames = UInt8[ndarray, "F y x 3"]

CRF = "12"  # x264's quality: visually lossless
BT709 = 1  # H.264's number of the colours that browsers expect


def write_video(path: Path, video: Video, fps: float, scale: int = 1) -> None:
    """Write a video in the format of the path's suffix, atomically.

    Args:
        path: Its folder is created if it is missing. The suffix is one of
            `SUFFIXES`; a png is a sheet of all frames.
        video: Pixels in [0, 1].
        fps: Frames per second.
        scale: Enlarges every pixel to a square of this side, so that small videos look crisp.

    Raises:
        UserError: For another suffix, or if the file cannot be written.
    """
    encode = _ENCODERS.get(path.suffix.lower())
    if encode is None:
        raise UserError(
            f"Cannot write a video to {path}. Give it the suffix .mp4, .gif, .webp or .png."
        )
    data = encode(video, fps, scale)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        sync(partial)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = error.strerror or "the disk refuses"
        raise UserError(
            f"Cannot write {path}: {reason}. Make room there, or choose another place."
        ) from error


def video_bytes(video: Video, fps: float, scale: int = 1) -> bytes:
    """An mp4 that browsers play, in memory (H.264, yuv420p).

    Colour is stored at half the resolution; with `scale` >= 2 every pixel keeps its own colour. Odd
    sizes are padded by repeating the last row or column.
    """
    pictures = _enlarged(video, scale)
    pictures = np.pad(
        pictures,
        ((0, 0), (0, pictures.shape[1] % 2), (0, pictures.shape[2] % 2), (0, 0)),
        mode="edge",
    )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": CRF}
        codec = stream.codec_context
        codec.thread_count = 1  # the bytes depend on the number of threads
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = 1  # 16 to 235
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=Interpolation.AREA
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def gif_bytes(video: Video, fps: float, scale: int = 1) -> bytes:
    """A gif that loops, in memory.

    All frames share one undithered palette, because a palette per frame would add flicker. Times
    are whole hundredths of a second.
    """
    pictures = _enlarged(video, scale)
    count, height, width, _ = pictures.shape
    strip = Image.fromarray(pictures.reshape(count * height, width, 3))
    strip = strip.quantize(256, dither=Image.Dither.NONE)
    durations = [10 * max(wait, 2) for wait in _waits(count, 100 / fps)]
    return imwrite(
        "<bytes>", np.asarray(strip).reshape(count, height, width), extension=".gif", mode="P",
        plugin="pillow", palette=bytes(strip.getpalette() or ()), duration=durations, loop=0,
    )  # fmt: skip


def webp_bytes(video: Video, fps: float, scale: int = 1) -> bytes:
    """An animated WebP that loops, in memory: lossless, with times in whole milliseconds."""
    pictures = _enlarged(video, scale)
    return imwrite(
        "<bytes>", pictures, extension=".webp", plugin="pillow", lossless=True, loop=0,
        duration=_waits(len(pictures), 1000 / fps),
    )  # fmt: skip


def sheet_bytes(video: Video, fps: float, scale: int = 1) -> bytes:
    """A png with all frames, in memory; see `contact_sheet`."""
    return contact_sheet(_enlarged(video, scale))


def columns(frames: int) -> int:
    """Frames per row of a sheet: about square, because browsers limit a picture's longer side."""
    return math.ceil(math.sqrt(frames))


def contact_sheet(frames: Frames, level: int = 6) -> bytes:
    """A png with frames in rows of `columns`; unused cells are black.

    Args:
        frames: The frames.
        level: Effort of the compression, 0 to 9.
    """
    count, height, width, _ = frames.shape
    wide = columns(count)
    rows = math.ceil(count / wide)
    grid = np.zeros((rows * wide, height, width, 3), dtype=np.uint8)
    grid[:count] = frames
    picture = grid.reshape(rows, wide, height, width, 3).swapaxes(1, 2)
    return imwrite(
        "<bytes>", picture.reshape(rows * height, wide * width, 3), extension=".png",
        plugin="pillow", compress_level=level,
    )  # fmt: skip


_ENCODERS: dict[str, Callable[[Video, float, int], bytes]] = {
    ".mp4": video_bytes, ".gif": gif_bytes, ".webp": webp_bytes, ".png": sheet_bytes,
}  # fmt: skip
SUFFIXES = frozenset(_ENCODERS)


def _waits(count: int, unit: float) -> list[int]:
    """Durations of frames of `unit` each, rounded so that the errors do not add up."""
    stamps = [round(unit * k) for k in range(count + 1)]
    return [after - before for before, after in itertools.pairwise(stamps)]


def _enlarged(video: Video, scale: int) -> Frames:
    """The frames as bytes; every pixel becomes a square of side `scale`."""
    if scale < 1 or video.shape[1] == 0:
        raise ValueError(f"a video of {video.shape[1]} frames cannot be written at scale {scale}")
    pixels = video.detach().cpu().float().mul(255).round().clamp(0, 255).to(torch.uint8)
    pictures: Frames = pixels.permute(1, 2, 3, 0).numpy()
    return pictures.repeat(scale, axis=1).repeat(scale, axis=2)
