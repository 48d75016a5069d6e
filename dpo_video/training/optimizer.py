"""AdamW, its learning rate, and the steps that a loss scaler skips."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dpo_video.memory.offload import HostAdamW
from dpo_video.settings import MemorySettings, TrainSettings

MAX_OVERFLOWS = 24
"""Steps in a row that a loss scaler may skip: a scale of 65536 is then far below any useful one."""


def make_optimizer(
    parameters: list[nn.Parameter], settings: TrainSettings, memory: MemorySettings
) -> torch.optim.Optimizer:
    """AdamW on the adapter; its state is in CPU memory with memory.offload=optimizer."""
    adamw = HostAdamW if "optimizer" in memory.offload else torch.optim.AdamW
    return adamw(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Linear warm-up, constant, linear decay; above 0 at the last step."""
    rising = (step + 1) / max(1, settings.warmup_steps)
    falling = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
    return settings.learning_rate * min(1.0, rising, falling)


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
