"""A classifier of `tiny`'s frames: color, shape and background, and whether the shape is broken.

It was trained by `python -m benchmarks.tiny.judge_recipe`, which with `--measure` prints its
accuracy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from dpo_video.errors import UserError
from dpo_video.tiny import scenes
from dpo_video.types import Videos

WEIGHTS = Path(__file__).with_name("judge.safetensors")
BROKEN = len(scenes.SHAPES)
"""Index of the last shape class: none of the five, but blurred, torn or melted."""
FEATURES = 24  # per frame
_FRAMES_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Outputs of the judge; `*frames` is an axis of frames, or the axes videos and frames."""

    color: Float[Tensor, "*frames 8"]
    """Log-probabilities, in the order of `scenes.COLORS`."""
    shape: Float[Tensor, "*frames 6"]
    """Log-probabilities, in the order of `scenes.SHAPES`, then `BROKEN`."""
    background: Float[Tensor, "*frames 8"]
    """Log-probabilities, in the order of `scenes.BACKGROUNDS`."""
    features: Float[Tensor, "*frames 24"]
    """Activations of the layer below the three heads."""


class Judge(nn.Module):
    """A small convolutional network on single frames, with a head per word of a caption."""

    video_mean: Tensor
    video_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_layer(12, 24),
            *_layer(24, 48, stride=2),
            *_layer(48, 48),
            *_layer(48, 64, stride=2),
            *_layer(64, 64),
        )
        self.features = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, FEATURES))
        self.color = nn.Linear(FEATURES, len(scenes.COLORS))
        self.shape = nn.Linear(FEATURES, len(scenes.SHAPES) + 1)
        self.background = nn.Linear(FEATURES, len(scenes.BACKGROUNDS))
        # Mean and standard deviation of real videos' features (benchmarks/tiny/features.py).
        self.register_buffer("video_mean", torch.zeros(2 * FEATURES))
        self.register_buffer("video_scale", torch.ones(2 * FEATURES))

    def forward(self, frames: Float[Tensor, "n 3 64 64"]) -> Sight:
        """Classify frames in [0, 1]."""
        # Keeps every pixel of an outline at a quarter of the operations.
        folded = F.pixel_unshuffle(2 * frames - 1, 2)
        grid = self.trunk(folded.contiguous(memory_format=torch.channels_last))
        features = self.features(torch.cat([grid.mean(dim=(2, 3)), grid.amax(dim=(2, 3))], dim=1))
        return Sight(
            color=self.color(features).log_softmax(dim=-1),
            shape=self.shape(features).log_softmax(dim=-1),
            background=self.background(features).log_softmax(dim=-1),
            features=features,
        )


def _layer(channels: int, width: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(width), nn.ReLU()


@functools.cache
def load_judge(device: torch.device = torch.device("cpu")) -> Judge:  # noqa: B008 - a constant
    """The trained judge in fp32, frozen, in evaluation mode; one object per device."""
    judge = Judge()
    judge.load_state_dict(load_file(WEIGHTS))
    return judge.eval().requires_grad_(False).to(device)


@torch.no_grad()
def judge_videos(videos: Videos, judge: Judge | None = None) -> Sight:
    """Classify every frame of videos in [0, 1]; the result has the axes `b F`.

    Raises:
        UserError: if the frames are not 64x64, the size that the judge was trained on.
    """
    if videos.shape[-2:] != (scenes.SIZE, scenes.SIZE):
        height, width = videos.shape[-2:]
        raise UserError(
            f"The judge of tiny's videos reads frames of {scenes.SIZE}x{scenes.SIZE} pixels, and "
            f"these have {width}x{height}. Use it with --backbone tiny only."
        )
    judge = judge or load_judge(videos.device)
    frames = videos.transpose(1, 2).flatten(0, 1).float()
    looks = [judge(part) for part in frames.split(_FRAMES_AT_ONCE)]
    grid = (len(videos), videos.shape[2])
    return Sight(
        **{
            name: torch.cat([getattr(look, name) for look in looks]).unflatten(0, grid)
            for name in ("color", "shape", "background", "features")
        }
    )
