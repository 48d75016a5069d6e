"""Ends a training once its loss is satisfied."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import final

import torch
from pydantic import Field
from torch import Tensor

from dpo_video.extensions import Listener, ListenerFactory
from dpo_video.support.report import StepEvent


@final
class EarlyStop(ListenerFactory):
    """Ends a training once its loss is satisfied: its gradient factor stays low.

    The factor is 0.5 for a policy that equals its reference, and falls to 0 as the margins grow;
    further steps then change the policy without teaching it.
    """

    below: float = Field(default=0.1, gt=0, lt=0.5)
    """Ends the training when the mean gradient factor is lower."""
    window: int = Field(default=20, ge=1)
    """Number of the last steps in that mean."""

    def __call__(self) -> Listener:
        """A listener for one training."""
        return _EarlyStop(self.below, self.window)


class _EarlyStop(Listener):
    def __init__(self, below: float, window: int) -> None:
        self._below = below
        self._factors: deque[float] = deque(maxlen=window)

    def on_step_end(self, event: StepEvent) -> None:
        """End the training if the mean is low; the figures are equal in all processes."""
        if not event.report.skipped:
            self._factors.append(event.report.gradient_factor)
        mean = sum(self._factors) / max(1, len(self._factors))
        if len(self._factors) == self._factors.maxlen and mean < self._below:
            self.run.end(
                f"early_stop: the mean gradient factor of {len(self._factors)} steps is "
                f"{mean:.3f}, below {self._below:g}."
            )

    def state(self) -> Mapping[str, Tensor]:
        """The factors so far."""
        return {"factors": torch.tensor(self._factors, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take them over."""
        self._factors.extend(state["factors"].tolist())
