"""The reference as the policy with its adapter off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dpo_video.memory.compile import is_compiled, zeroed_adapter
from dpo_video.strategies import Reference, ReferenceModel


@final
class Toggle(Reference):
    """The same network with its adapter off: no second set of weights.

    The memory-optimised mode of Video-DPO. What it saves is the weights (2.5 GiB of 46 for an
    SD1.5 motion model), not the activations.
    """

    def attach(self, policy: nn.Module) -> ReferenceModel:
        """Toggle the policy's own adapter."""
        return Toggled(policy)


@final
class Toggled(ReferenceModel):
    """A policy's own network, its adapter off while it is used."""

    def __init__(self, policy: nn.Module, noise_draws: int | None = None) -> None:
        self._policy = policy
        self._layers = [part for part in policy.modules() if isinstance(part, BaseTunerLayer)]
        self.noise_draws = noise_draws

    @contextmanager
    def network(self) -> Iterator[nn.Module]:
        """The policy with its adapter off; on again afterwards, whatever happens inside.

        By the flag that every adapted layer reads. peft's own `disable_adapter` also takes
        `requires_grad` from all weights and gives it back, which costs more than a hundredth of a
        step and changes nothing where no graph is made. A compiled network keeps it on, and adds
        zeros.
        """
        if is_compiled(self._policy):
            with zeroed_adapter(self._policy):
                yield self._policy
            return
        before = [layer._disable_adapters for layer in self._layers]
        try:
            for layer in self._layers:
                layer._disable_adapters = True
            yield self._policy
        finally:
            for layer, was_off in zip(self._layers, before, strict=True):
                layer._disable_adapters = was_off
