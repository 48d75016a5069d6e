"""A slow copy of the adapter as the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from dpo_video.strategies import Reference, ReferenceModel


@final
class EMA(Reference):
    """Exponential moving average: a slow copy of the policy, which follows it at every step.

    After each optimizer step, `reference = decay * reference + (1 - decay) * policy` (Linear-DPO,
    Li et al. 2026, arXiv 2605.21123). Only the adapter is copied. The margin is then that of the
    last steps and stays small: the policy may leave the base model, so watch an evaluation. With
    `decay` 1 it is the reference `toggle` for a policy that has not moved.
    """

    decay: float = Field(default=0.99, ge=0, le=1)
    """Share of the reference that is kept at each step."""

    def attach(self, policy: nn.Module) -> ReferenceModel:
        """Start at the policy."""
        return _Average(policy, self.decay)


@final
class _Average(ReferenceModel):
    """The policy's network, with the average of its adapter while it is the reference."""

    def __init__(self, policy: nn.Module, decay: float) -> None:
        self._policy, self._decay = policy, decay
        self._places = {
            f"{path}.{name}": (module, name)
            for path, module in policy.named_modules()
            for name, weight in module.named_parameters(recurse=False)
            if weight.requires_grad
        }
        self._average = {path: weight.detach().clone() for path, weight in self._weights().items()}

    def _weights(self) -> dict[str, nn.Parameter]:
        """The policy's own trained weights."""
        return {path: getattr(module, name) for path, (module, name) in self._places.items()}

    @contextmanager
    def network(self) -> Iterator[nn.Module]:
        """Yield the policy with the averaged adapter; its own is back afterwards."""
        own = {path: weight.data for path, weight in self._weights().items()}
        try:
            self._use(self._average)
            yield self._policy
        finally:
            self._use(own)

    def _use(self, values: Mapping[str, Tensor]) -> None:
        for path, weight in self._weights().items():
            weight.data = values[path]
        torch.clear_autocast_cache()  # it holds casts of the others

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average towards the policy."""
        for path, weight in self._weights().items():
            self._average[path].lerp_(weight, 1 - self._decay)

    def state(self) -> Mapping[str, Tensor]:
        """The average by the names of the adapter's weights."""
        return self._average

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state."""
        weights = self._weights()
        self._average = {path: value.to(weights[path].device) for path, value in state.items()}
