"""Further kinds of strategy: how a run takes its steps, and who is told of them.

As in `dpo_video.strategies`, everything here is abstract: what runs is in the folder named after
the kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from dpo_video.settings import TrainSettings
from dpo_video.strategies import Strategy, VideoModel
from dpo_video.support.report import StepEvent
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


class TrainingRun(ABC):
    """What a listener may use of a run."""

    model: VideoModel
    """The model, whose denoiser has the adapter."""
    policy: nn.Module
    """The denoiser with its adapter, a peft model."""
    settings: TrainSettings
    """Table [train]."""
    options: Mapping[str, Any]
    """All of the run's options by path."""
    out: Path
    """The run's folder."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Number of optimizer steps done."""

    @property
    @abstractmethod
    def is_main(self) -> bool:
        """Whether this is the process that writes files, one of several."""

    @abstractmethod
    def end(self, reason: str) -> None:
        """End the training after this step, with a checkpoint.

        Call it in every process alike. `reason` is a sentence for the user.
        """


class Listener:
    """Receives what happens in a training. Override the methods you need.

        class Print(Listener):
            def on_step_end(self, event: StepEvent) -> None:
                print(event.report.step, event.report.loss)

    They are called in every process. An exception ends the training.
    """

    kind: ClassVar[str] = "listener"
    run: TrainingRun

    def on_train_begin(self, run: TrainingRun) -> None:
        """Called before the first step, and before the first step after resuming."""
        self.run = run

    def on_step_end(self, event: StepEvent) -> None:
        """Called after every optimizer step, before the checkpoint that `event` names."""

    def on_checkpoint(self, folder: Path) -> None:
        """Called after a checkpoint was written to `folder`."""

    def on_train_end(self) -> None:
        """Called after the last step and its checkpoint, or when the run was stopped."""

    def state(self) -> Mapping[str, Tensor]:
        """What a resumed run needs of it, saved in checkpoints; empty by default."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state from a checkpoint, with tensors on the CPU, before the first step."""


class ListenerFactory(Strategy, ABC):
    """Makes a listener for a training, which is chosen by `--listener NAME`."""

    kind: ClassVar[str] = "listener"

    @abstractmethod
    def __call__(self) -> Listener:
        """A new listener for one training."""
