"""Write videos as mp4 or gif, atomically and with reproducible bytes."""

from __future__ import annotations

import contextlib
import io
import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace, Interpolation
from numpy.typing import NDArray
from PIL import Image

from dpo_video.errors import UserError
from dpo_video.support.atomic import sync
from dpo_video.types import Video

CRF = "12"  # x264's quality: visually lossless
BT709 = 1  # H.264's number of the colours that browsers expect


def write_video(path: Path, video: Video, fps: float, scale: int = 1) -> None:
    """Write an mp4 or a gif, by the path's suffix, atomically.

    Args:
        path: Its folder is created if it is missing.
        video: Pixels in [0, 1].
        fps: Frames per second.
        scale: Enlarges every pixel to a square of this side, so that small videos look crisp.

    Raises:
        UserError: For another suffix, or if the file cannot be written.
    """
    encoders = {".mp4": video_bytes, ".gif": gif_bytes}
    encode = encoders.get(path.suffix.lower())
    if encode is None:
        raise UserError(f"Cannot write a video to {path}. Give it the suffix .mp4 or .gif.")
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
    are whole hundredths of a second, rounded so that the errors do not add up.
    """
    pictures = _enlarged(video, scale)
    count, height, width, _ = pictures.shape
    strip = Image.fromarray(pictures.reshape(count * height, width, 3))
    strip = strip.quantize(256, dither=Image.Dither.NONE)
    images = [strip.crop((0, k * height, width, (k + 1) * height)) for k in range(count)]
    stamps = [round(100 * k / fps) for k in range(count + 1)]
    durations = [10 * max(after - before, 2) for before, after in itertools.pairwise(stamps)]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0
    )
    return buffer.getvalue()


def _enlarged(video: Video, scale: int) -> NDArray[np.uint8]:
    """Bytes `F H W 3`; every pixel becomes a square of side `scale`."""
    if scale < 1 or video.shape[1] == 0:
        raise ValueError(f"a video of {video.shape[1]} frames cannot be written at scale {scale}")
    pixels = video.detach().cpu().float().mul(255).round().clamp(0, 255).to(torch.uint8)
    pictures: NDArray[np.uint8] = pixels.permute(1, 2, 3, 0).numpy()
    return pictures.repeat(scale, axis=1).repeat(scale, axis=2)
