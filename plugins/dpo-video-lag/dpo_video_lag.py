"""The reference `lag`: an example of a plugin for dpo-video whose reference changes in a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from dpo_video.plugin import Field, Reference, ReferenceModel


@final
class Lag(Reference):
    """The policy as it was some steps ago: renewed at once, every `steps` optimizer steps.

    The hard update of TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656); the reference `ema` of
    dpo-video is its soft one.
    """

    steps: int = Field(default=100, ge=1)
    """Optimizer steps until the reference becomes the policy again."""

    def attach(self, policy: nn.Module) -> ReferenceModel:
        """Start at the policy."""
        return _Earlier(policy, self.steps)


@final
class _Earlier(ReferenceModel):
    def __init__(self, policy: nn.Module, steps: int) -> None:
        self._policy, self._steps = policy, steps
        self._places = {
            f"{path}.{name}": (module, name)
            for path, module in policy.named_modules()
            for name, weight in module.named_parameters(recurse=False)
            if weight.requires_grad
        }
        self._done = 0
        self._earlier = {name: weight.detach().clone() for name, weight in self._own().items()}

    def _own(self) -> dict[str, nn.Parameter]:
        return {path: getattr(module, name) for path, (module, name) in self._places.items()}

    @contextmanager
    def network(self) -> Iterator[nn.Module]:
        """Yield the policy with its earlier adapter; its own is back afterwards."""
        own = {name: weight.data for name, weight in self._own().items()}
        try:
            self._use(self._earlier)
            yield self._policy
        finally:
            self._use(own)

    def _use(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._own().items():
            weight.data = values[name]
        torch.clear_autocast_cache()  # it holds casts of the weights before

    def after_step(self) -> None:
        """Renew it, if it is time."""
        self._done += 1
        if self._done % self._steps == 0:
            self._earlier = {name: each.detach().clone() for name, each in self._own().items()}

    def state(self) -> Mapping[str, Tensor]:
        """All that changes during a run: what a checkpoint must hold."""
        return {**self._earlier, "done": torch.tensor(self._done)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint."""
        self._done = int(state["done"])
        self._earlier = {name: state[name].to(each.device) for name, each in self._own().items()}
