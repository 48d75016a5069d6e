"""Linear warm-up and decay."""

from __future__ import annotations

from typing import final

from dpo_video.extensions import Schedule
from dpo_video.settings import TrainSettings


@final
class Linear(Schedule):
    """Linear warm-up, constant, linear decay; above 0 at the last step.

    Its options are `train.warmup_steps` and `train.decay`.
    """

    def __call__(self, step: int, settings: TrainSettings) -> float:
        """The smaller of the rising and the falling line, at most 1."""
        rising = (step + 1) / max(1, settings.warmup_steps)
        falling = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
        return min(1.0, rising, falling)
