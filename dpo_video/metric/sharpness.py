"""Sharpness: steepness of the edges, a guard against blur."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from kornia.filters import gaussian_blur2d
from torch import Tensor

from dpo_video.strategies import Metric
from dpo_video.types import PerPair, Videos

REACH = 4  # pixels to each side within which the contrast of an edge is measured


@final
class Sharpness(Metric):
    """Sharpness: gradient of the edges over their contrast, the inverse of their width in pixels.

    A guard against improving other metrics by blur. Edge width as a measure of blur: Marziliano et
    al. 2002. No single edge is detected: `gradient / contrast` is averaged over all pixels, with
    weights that favour strong edges over noise. The position, direction and contrast (range within
    4 pixels) of edges come from a smoothed frame; the gradient along that direction comes from the
    original frame, where noise averages out over many pixels. Invariant to contrast and brightness.
    A frame of one colour has no edges and scores 0.

    Limits: the unit is per pixel, so compare videos of one size only; edges wider than 8 pixels
    count as 8; noise in the contrast lowers the value by a few per cent.
    """

    higher_is_better: ClassVar[bool] = True
    role: ClassVar[Literal["target", "motion", "guard"]] = "guard"
    unit: ClassVar[str] = "1 / pixel"

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One value per video: the mean over its frames."""
        frames = videos.float().transpose(1, 2).flatten(0, 1)
        smooth = gaussian_blur2d(frames, (5, 5), (1.0, 1.0), border_type="replicate")
        edge, slope = _gradient(smooth), _gradient(frames)
        strength = edge.square().sum(dim=(1, 2)).sqrt()
        contrast = _range(smooth).square().sum(1).sqrt()
        along = (slope * edge).sum(dim=(1, 2))  # slope along the edge's direction, times strength
        steep = (along * strength.square()).sum(dim=(1, 2))
        width = (contrast * strength**3).sum(dim=(1, 2))
        return (steep / width.clamp(min=1e-12)).unflatten(0, (len(videos), -1)).mean(1)


def _gradient(frames: Float[Tensor, "n c H W"]) -> Float[Tensor, "n 2 c H W"]:
    padded = F.pad(frames, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return torch.stack([dx, dy], dim=1) / 2


def _range(frames: Float[Tensor, "n c H W"]) -> Float[Tensor, "n c H W"]:
    """Maximum minus minimum within `REACH` pixels, per channel."""
    reach, window = REACH, 2 * REACH + 1
    brightest, darkest = (
        F.max_pool2d(sign * frames, window, stride=1, padding=reach) for sign in (1, -1)
    )
    return brightest + darkest
