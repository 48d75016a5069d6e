"""The noise that sampling starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpo_video.strategies import VideoModel
from dpo_video.support.rng import generator
from dpo_video.types import (
    Latents,
)


def initial_noise(model: VideoModel, seeds: Sequence[int]) -> Latents:
    """What sampling starts from, one video a seed: the same seed always means the same noise."""
    drawn = [torch.randn(model.latent_shape, generator=generator(seed, "video")) for seed in seeds]
    return torch.stack(drawn).to(model.device)
