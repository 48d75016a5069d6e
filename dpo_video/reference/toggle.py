"""The policy with its adapter off as the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dpo_video.memory.compile import adapter_at_start, is_compiled, kept_start
from dpo_video.strategies import Reference, ReferenceModel


@final
class Toggle(Reference):
    """Toggled adapter: the policy's own network with its adapter off, without a second copy.

    It is the memory-optimised mode of Video-DPO. It saves the weights (2.5 GiB of 46 for an SD1.5
    motion model), not the activations.
    """

    def attach(self, policy: nn.Module) -> ReferenceModel:
        """Use the policy's own network with its adapter off."""
        return Toggled(policy)


@final
class Toggled(ReferenceModel):
    """The policy's network, with its adapter off while it is used as the reference."""

    def __init__(self, policy: nn.Module, noise_draws: int | None = None) -> None:
        self._policy = policy
        self._layers = [part for part in policy.modules() if isinstance(part, BaseTunerLayer)]
        self.noise_draws = noise_draws

    @contextmanager
    def network(self) -> Iterator[nn.Module]:
        """Yield the policy with its adapter off; it is on again afterwards, also after an error.

        This sets the flag that every adapted layer reads. peft's own `disable_adapter` also clears
        and restores `requires_grad` of all weights, which costs more than 1% of a step and changes
        nothing without a graph. A compiled network, and one that was trained from a LoRA, keep
        their adapter, with its weights of the start.
        """
        if is_compiled(self._policy) or kept_start(self._policy):
            with adapter_at_start(self._policy):
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
