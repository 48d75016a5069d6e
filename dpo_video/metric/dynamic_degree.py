"""Dynamic degree: speed of what moves, robust to flicker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from kornia.filters import gaussian_blur2d
from pydantic import Field
from torch import Tensor

from dpo_video.errors import UserError
from dpo_video.metric._flow import dense_flow, warp
from dpo_video.strategies import Metric
from dpo_video.types import PerPair, Videos

ACCEPTANCE = 0.7  # a path is accepted if it lowers the mismatch to this share
LIGHT = 0.8  # share of the local brightness that is subtracted; the rest guides large motions


@final
class DynamicDegree(Metric):
    """Dynamic degree: speed of what moves, robust to flicker, in % of the diagonal per frame.

    After VBench's dynamic degree (Huang et al. 2023, arXiv 2311.17982): the fastest 5% of the
    picture count, so that a small object on a still background is not averaged away. VBench uses
    the flow of consecutive frames, in which flicker looks like motion. Here every pixel of a few
    anchor frames is tracked directly to each of the surrounding frames, and a line is fitted to its
    path. The slope of the line is motion; its residual is flicker. Pixels whose slope is not
    significant against the residual (an F-test) count as still, and the variance that noise adds is
    subtracted from the squared speed of the others:

    `100 / diagonal * sqrt(mean over anchors and the fastest pixels of |speed|^2 - variance)`

    The local brightness is subtracted from the frames before tracking, which removes flicker of
    soft patches of light. A line must also predict the frames on both sides of the anchor much
    better than no motion does; no line does so across a leap from one place to another.

    Limits: an object smaller than `share` of the picture counts by the root of its area; an object
    that moves a tenth of the picture per frame is lost; motion that changes direction within the
    tracked window, or is interrupted by a leap, counts in part or not at all; the spin of a flat
    disc is not seen; flicker slower than the window looks like motion; grain as strong as the
    picture's contrast hides slow motion; videos of fewer than 5 frames are too short for the tests,
    and their flicker counts as motion.
    """

    higher_is_better: ClassVar[bool] = True
    role: ClassVar[Literal["target", "motion", "guard"]] = "motion"
    unit: ClassVar[str] = "% of diagonal / frame"

    share: float = Field(default=0.05, gt=0, le=1)
    """Share of the picture, by speed, that counts (VBench: 5%)."""
    radius: int = Field(default=4, ge=2)
    """Frames before and after the anchor frame that a pixel is tracked to."""
    significance: float = Field(default=1e-4, gt=0, lt=1)
    """Significance level of the test that a pixel moves: the false positive rate of flicker."""
    size: int = Field(default=128, ge=16)
    """Shorter side, in pixels, that larger videos are resized to."""

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One value per video; UserError for videos of a single frame."""
        frames = videos.shape[2]
        if frames < 2:
            raise UserError(
                "dynamic_degree tracks pixels from frame to frame, and these videos have only "
                "one. Use videos of 2 frames or more."
            )
        videos = self._reduce(videos.float())
        radius = min(self.radius, (frames - 1) // 2)
        if radius < 2:
            anchor, offsets, windows = 0, [frames - 1], [videos]
        else:
            videos = _fine(videos)
            anchor, offsets = radius, [k for k in range(-radius, radius + 1) if k]
            length = 2 * radius + 1
            count = math.ceil((frames - length) / radius) + 1
            starts = torch.linspace(0, frames - length, count).round().int().tolist()
            windows = [videos[:, :, start : start + length] for start in starts]
        stacked = torch.cat(windows)
        speed, squared = self._speed(_track(stacked, anchor, offsets), offsets)
        explains = _explains(speed, stacked, anchor, offsets)
        squared = torch.where(explains, squared, 0).flatten(1)
        fastest = squared.topk(max(1, round(self.share * squared.shape[1])), dim=1).values
        diagonal = math.hypot(*videos.shape[-2:])
        pooled = fastest.mean(1).unflatten(0, (len(windows), -1)).mean(0)
        return pooled.sqrt() * (100 / diagonal)

    def _reduce(self, videos: Videos) -> Float[Tensor, "b 3 F h w"]:
        """Shrink to `size`: enough resolution for tracking, and less noise."""
        scale = self.size / min(videos.shape[-2:])
        if scale >= 1:
            return videos
        small = F.interpolate(
            videos.transpose(1, 2).flatten(0, 1),
            size=[round(side * scale) for side in videos.shape[-2:]],
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        return small.unflatten(0, (len(videos), -1)).transpose(1, 2)

    def _speed(
        self, path: Float[Tensor, "n k 2 h w"], offsets: list[int]
    ) -> tuple[Float[Tensor, "n 2 h w"], Float[Tensor, "n h w"]]:
        """Speed of each pixel along a straight line, and its square minus the variance by noise.

        In pixels per frame; the square is 0 where the fit is not significant.
        """
        time = torch.tensor(offsets, dtype=path.dtype, device=path.device)
        spread = time.square().sum()
        speed = torch.einsum("nkchw,k->nchw", path, time) / spread
        squared = speed.square().sum(1)
        if len(offsets) == 1:
            return speed, squared
        line = path.mean(1, keepdim=True) + speed[:, None] * time[:, None, None, None]
        residual = (path - line).square().sum(dim=(1, 2)) / (len(offsets) - 2)
        variance = residual / spread  # of the speed of a pixel that does not move
        # Quantile of the F distribution with 2 and `freedom` degrees, in closed form.
        freedom = 2 * (len(offsets) - 2)
        critical = freedom / 2 * (self.significance ** (-2 / freedom) - 1)
        return speed, torch.where(squared > critical * variance, squared - variance, 0)


def _fine(videos: Videos) -> Float[Tensor, "b 3 F h w"]:
    """Frames minus most of their local brightness: light flickers in patches, outlines stay."""
    frames = videos.transpose(1, 2).flatten(0, 1)
    fine = frames - LIGHT * _around(frames, sigma=4.0)
    return fine.unflatten(0, (len(videos), -1)).transpose(1, 2)


def _explains(
    speed: Float[Tensor, "n 2 h w"],
    windows: Float[Tensor, "n 3 f H W"],
    anchor: int,
    offsets: list[int],
) -> Bool[Tensor, "n h w"]:
    """Whether `speed` predicts both the frames before the anchor and those after it.

    No constant speed predicts both sides of a leap.
    """
    frame, full = windows[:, :, anchor], F.interpolate(speed, size=windows.shape[-2:])
    accepted = torch.ones_like(frame[:, 0], dtype=torch.bool)
    for side in ([k for k in offsets if k < 0], [k for k in offsets if k > 0]):
        moving = still = torch.zeros_like(frame[:, :1])
        for offset in side:
            other = windows[:, :, anchor + offset]
            moving = moving + _mismatch(frame, warp(other, full * offset))
            still = still + _mismatch(frame, other)
        if side:
            accepted &= (moving < ACCEPTANCE * still)[:, 0]
    return accepted[:, ::2, ::2]


def _track(windows: Videos, anchor: int, offsets: list[int]) -> Float[Tensor, "n k 2 h w"]:
    """Displacement of each pixel of the anchor frame after `offsets` frames, in pixels.

    Every offset is matched with the anchor frame directly, so that errors do not accumulate; the
    path up to there only gives the initial flow. Half the resolution is enough over several frames.
    """
    frame = windows[:, :, anchor]
    found: dict[int, Tensor] = {}
    for offset in sorted(offsets, key=abs):
        other = windows[:, :, anchor + offset]
        previous = found.get(offset - (1 if offset > 0 else -1))
        start = None
        if previous is not None:
            # Extrapolate the path only where that explains this frame: the error of a pixel
            # without texture would accumulate and look like motion.
            guess = previous * (abs(offset) / (abs(offset) - 1))
            follows = _mismatch(frame, warp(other, guess)) < ACCEPTANCE * _mismatch(frame, other)
            start = torch.where(follows, guess, 0)
        found[offset] = dense_flow(frame, other, start=start, finest=1)
    return torch.stack([found[k] for k in offsets], dim=1)[..., ::2, ::2]


def _mismatch(
    first: Float[Tensor, "n 3 H W"], second: Float[Tensor, "n 3 H W"]
) -> Float[Tensor, "n 1 H W"]:
    """Mean squared difference around each pixel."""
    return _around((first - second).square().mean(1, keepdim=True), sigma=3.0)


def _around(image: Float[Tensor, "n c H W"], sigma: float) -> Float[Tensor, "n c H W"]:
    """Gaussian mean around each pixel, `sigma` in pixels."""
    side = 4 * round(sigma) + 1
    return gaussian_blur2d(image, (side, side), (sigma, sigma), border_type="replicate")
