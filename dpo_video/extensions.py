"""Further kinds of strategy: how a run takes its steps.

As in `dpo_video.strategies`, everything here is abstract: what runs is in the folder named after
the kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Generator, nn

from dpo_video.settings import TrainSettings
from dpo_video.strategies import Strategy, VideoModel
from dpo_video.types import PerPair


class TimestepSampler(Strategy, ABC):
    """Draws the timesteps that a run trains at.

    It has no state: what it draws depends on the generator alone, which is made from the run's
    seed, the pair and the number of its draw. So a resumed run draws the same.
    """

    kind: ClassVar[str] = "timesteps"

    @abstractmethod
    def __call__(self, model: VideoModel, n: int, generator: Generator) -> PerPair:
        """Draw `n` timesteps in the family's unit, fp32 on the CPU.

        `model.sample_timesteps` draws from the family's own distribution, and
        `model.add_noise` tells how much noise there is at a timestep.
        """


class Optimizer(Strategy, ABC):
    """Makes the optimizer of the adapter's weights."""

    kind: ClassVar[str] = "optimizer"
    offloads: ClassVar[bool] = False
    """Whether it can keep its state in CPU memory, as memory.offload=optimizer asks."""

    @abstractmethod
    def __call__(
        self, parameters: list[nn.Parameter], settings: TrainSettings, *, on_host: bool = False
    ) -> torch.optim.Optimizer:
        """An optimizer of all `parameters`.

        Its learning rate is set before every step. What its `state_dict` returns is saved in
        checkpoints: tensors, numbers, texts, and lists and dicts of them.

        Args:
            parameters: The adapter's weights.
            settings: Table [train], such as its weight decay.
            on_host: Keep the state in CPU memory; only asked of one that `offloads`.
        """


class Schedule(Strategy, ABC):
    """The learning rate over the steps of a run.

    It has no state: a factor depends on the step and the settings alone, so that a resumed run has
    the same.
    """

    kind: ClassVar[str] = "schedule"

    @abstractmethod
    def __call__(self, step: int, settings: TrainSettings) -> float:
        """Factor of `train.learning_rate` at a step, 0 or more.

        Args:
            step: Number of the step, from 0 to `settings.steps - 1`.
            settings: Table [train], such as its number of steps.
        """
