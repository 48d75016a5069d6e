"""Inputs for contracts and tests: errors, videos, clips and noise, drawn from seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from dpo_video.strategies import Labeler, VideoModel
from dpo_video.tiny.scenes import spread_captions
from dpo_video.types import Clip, PairErrors, Videos

PREFERENCES = torch.tensor(
    [[1.0, 1, 1, 1], [-1.0, -1, -1, -1], [1.0, 1, 0, -1], [-1.0, 1, -1, -1], [1.0, 1, -1, -1]]
)
"""Labels per frame: first better, second better, mostly first, mostly second, and even."""
SMALL_CHANGE = 1e-4
"""Typical change of error in training: 0.25 logits at a slope of 2500, where every loss still has a
gradient."""


def random_errors(
    seed: int = 0, pairs: int = 3, *, full_region: bool = True, change: float | None = None
) -> PairErrors:
    """Errors in [0, 1) on latents of 2x4x3x3, the first video preferred everywhere.

    Args:
        seed: Seed of all draws.
        pairs: Number of pairs.
        full_region: Whether the region is everything, or two fifths of the elements.
        change: Largest change of the policy's errors from the reference's; None draws them
            independently.
    """
    generator = Generator().manual_seed(seed)
    shape = (pairs, 2, 4, 3, 3)
    region = torch.ones(pairs, 1, 4, 3, 3)
    if not full_region:
        region = (torch.rand(region.shape, generator=generator) < 0.4).float()
    policy = [torch.rand(shape, generator=generator) for _ in range(2)]
    reference = [torch.rand(shape, generator=generator) for _ in range(2)]
    if change is not None:
        policy = [
            (near + change * (2 * draw - 1)).abs()
            for near, draw in zip(reference, policy, strict=True)
        ]
    signs = torch.rand(shape, generator=generator).sub(0.5).sign()
    return PairErrors(
        policy_first=policy[0],
        policy_second=policy[1],
        reference_first=reference[0],
        reference_second=reference[1],
        policy_product=signs * (policy[0] * policy[1]).sqrt(),
        preference=torch.ones(pairs, 4),
        region=region,
        strength=torch.full((pairs,), 0.75),
        timestep=torch.linspace(100, 900, pairs),
        signal=torch.linspace(0.9, 0.1, pairs),
        noise=torch.linspace(0.1, 0.9, pairs),
        progress=torch.full((pairs,), 0.5),
    )


def swapped(errors: PairErrors) -> PairErrors:
    """The same pairs with their videos in the other order and the same preference."""
    return replace(
        errors,
        policy_first=errors.policy_second,
        policy_second=errors.policy_first,
        reference_first=errors.reference_second,
        reference_second=errors.reference_first,
    )


def one_of(errors: PairErrors, index: int) -> PairErrors:
    """The errors of one pair, as a batch of size 1."""
    return errors.rows(slice(index, index + 1))


def small_videos(
    count: int = 2, frames: int = 5, height: int = 64, width: int = 64, *, seed: int = 0
) -> Videos:
    """Smooth random textures that move by one pixel per frame, with a little grain."""
    generator = Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 2 + height // 6, 2 + width // 6, generator=generator)
    texture = F.interpolate(coarse, size=(height, width + frames - 1), mode="bilinear")
    drifting = torch.stack([texture[..., t : t + width] for t in range(frames)], dim=2)
    grain = 0.02 * torch.randn(drifting.shape, generator=generator)
    return (drifting + grain).clamp(0, 1)


class SteadyLabeler(Labeler):
    """Prefers the video that changes less from frame to frame, for pair builders that need one."""

    def __call__(
        self, prompts: Sequence[str], first: Videos, second: Videos, segments: Sequence[slice]
    ) -> Float[Tensor, "b s"]:
        """+1 where the first video changes less."""
        change = [
            torch.stack(
                [video[:, :, part].diff(dim=2).abs().sum(dim=(1, 2, 3, 4)) for part in segments]
            )
            for video in (first, second)
        ]
        return (change[1] - change[0]).sign().T


def random_clip(model: VideoModel) -> Clip:
    """A video of random pixels at the model's shape, with a caption."""
    shape = model.shape
    video = small_videos(1, shape.frames, shape.height, shape.width)[0]
    return Clip(name="random", caption=spread_captions(1)[0], video=video)


def latent_noise(model: VideoModel, count: int) -> Float[Tensor, "b c f h w"]:
    """Noise of the model's latent shape, on its device."""
    generator = Generator().manual_seed(0)
    return torch.randn(count, *model.latent_shape, generator=generator).to(model.device)
