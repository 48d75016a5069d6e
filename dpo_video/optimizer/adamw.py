"""AdamW."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import nn

from dpo_video.extensions import Optimizer
from dpo_video.memory.offload import HostAdamW
from dpo_video.settings import TrainSettings


@final
class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Its options are `train.betas` and `train.weight_decay`.
    """

    offloads: ClassVar[bool] = True

    def __call__(
        self, parameters: list[nn.Parameter], settings: TrainSettings, *, on_host: bool = False
    ) -> torch.optim.Optimizer:
        """PyTorch's, or one whose state is in CPU memory."""
        adamw = HostAdamW if on_host else torch.optim.AdamW
        return adamw(
            parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
