"""The reference as the policy with its adapter off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from torch import nn

from dpo_video.strategies import Anchor, Reference


@final
class Toggle(Reference):
    """The same network with its adapter off: no second set of weights.

    The memory-optimised mode of Video-DPO. What it saves is the weights (2.5 GiB of 46 for an
    SD1.5 motion model), not the activations.
    """

    def follow(self, policy: nn.Module) -> Anchor:
        """Toggle the policy's own adapter."""
        return Toggled(policy)


@final
class Toggled(Anchor):
    """A policy's own network, its adapter off while it is used."""

    def __init__(self, policy: nn.Module, draws: int | None = None) -> None:
        self._policy = policy
        self.draws = draws

    @contextmanager
    def network(self) -> Iterator[nn.Module]:
        """The policy with its adapter off; on again afterwards, whatever happens inside."""
        with self._policy.disable_adapter():  # type: ignore[operator]
            yield self._policy
