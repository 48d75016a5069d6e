"""What an optimizer and a schedule return, checked, and the steps that a loss scaler skips."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dpo_video.errors import TrainingError
from dpo_video.extensions import Optimizer, Schedule
from dpo_video.registry.returned import wrong
from dpo_video.settings import MemorySettings, TrainSettings

MAX_OVERFLOWS = 24
"""Steps in a row that a loss scaler may skip: a scale of 65536 is then far below any useful one."""


def check_offload(optimizer: Optimizer, memory: MemorySettings) -> None:
    """Raise a TrainingError if the optimizer's state cannot be kept in CPU memory as asked."""
    if "optimizer" in memory.offload and not optimizer.offloads:
        raise TrainingError(
            f"{type(optimizer).__name__} cannot keep its state in CPU memory. Leave optimizer out "
            "of memory.offload, or train with --optimizer adamw."
        )


def make_optimizer(
    optimizer: Optimizer,
    parameters: list[nn.Parameter],
    settings: TrainSettings,
    memory: MemorySettings,
) -> torch.optim.Optimizer:
    """The optimizer of the adapter; its state is in CPU memory with memory.offload=optimizer.

    Raises:
        PluginError: if it is none, or not one of all parameters.
    """
    made = optimizer(parameters, settings, on_host="optimizer" in memory.offload)
    if not isinstance(made, torch.optim.Optimizer):
        raise wrong(optimizer, f"makes a {type(made).__name__}, no torch.optim.Optimizer")
    trained = {id(each) for group in made.param_groups for each in group["params"]}
    if trained != {id(each) for each in parameters}:
        raise wrong(optimizer, "does not train exactly the parameters that it is given")
    return made


def learning_rate(schedule: Schedule, settings: TrainSettings, step: int) -> float:
    """The learning rate of a step.

    Raises:
        PluginError: if the schedule's factor is not a number of 0 or more.
    """
    factor = schedule(step, settings)
    if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
        raise wrong(schedule, f"returns {factor!r} at step {step}, not a number of 0 or more")
    return settings.learning_rate * factor


class LossScaling:
    """Tells overflows, which a loss scaler handles, from gradients that are not finite."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.scaler: Any = accelerator.scaler
        self._overflows = 0

    def accepts(self, grad_norm: float) -> bool:
        """Whether to call the optimizer: a scaler skips overflows while it finds its scale.

        Call it once per step.
        """
        finite = math.isfinite(grad_norm)
        self._overflows = 0 if finite else self._overflows + 1
        return finite or (self.scaler is not None and self._overflows <= MAX_OVERFLOWS)

    def skip(self) -> None:
        """Update the scale after a step without an optimizer call."""
        if self.scaler is not None:
            self.scaler.update()
