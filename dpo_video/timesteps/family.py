"""The timesteps that a family was trained at."""

from __future__ import annotations

from typing import final

from torch import Generator

from dpo_video.extensions import TimestepSampler
from dpo_video.registry.returned import checked
from dpo_video.strategies import VideoModel
from dpo_video.types import PerPair


@final
class Family(TimestepSampler):
    """The backbone's own distribution: `VideoModel.sample_timesteps`."""

    def __call__(self, model: VideoModel, n: int, generator: Generator) -> PerPair:
        """What the model draws."""
        return checked(model, "timesteps", model.sample_timesteps(n, generator), (n,), device="cpu")
