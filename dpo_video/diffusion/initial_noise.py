"""Initial noise of sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpo_video.strategies import VideoModel
from dpo_video.support.rng import generator
from dpo_video.types import Latents


def initial_noise(model: VideoModel, seeds: Sequence[int]) -> Latents:
    """Initial noise, one video per seed; the same seed always gives the same noise."""
    drawn = [torch.randn(model.latent_shape, generator=generator(seed, "video")) for seed in seeds]
    return torch.stack(drawn).to(model.device)
