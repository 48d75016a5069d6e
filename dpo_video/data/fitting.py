"""Fit frames to a backbone's shape: in time, then in size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from dpo_video.errors import UserError
from dpo_video.types import Video, VideoShape

EPSILON = 1e-6  # seconds; tolerates the rounding of time stamps


def fit_video(
    frames: UInt8[Tensor, "3 n y x"] | Float[Tensor, "3 n y x"],
    fps: float,
    shape: VideoShape,
    start: float = 0.0,
) -> Video:
    """Resample in time, resize to cover the shape and crop the centre.

    Takes the frames nearest to the times `start + k / shape.fps`. A video that is too short for
    that, but has at least `shape.frames` frames, is slowed down: evenly spaced frames are taken.

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
