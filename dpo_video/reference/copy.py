"""A second network as the reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from torch import nn

from dpo_video.memory.compile import is_compiled, kept_start, reset_adapter
from dpo_video.strategies import Reference, ReferenceModel


@final
class Copy(Reference):
    """Deep copy of the denoiser without the adapter: simplest, but the weights are in memory twice.

    It is the standard mode of Video-DPO.
    """

    def attach(self, policy: nn.Module) -> ReferenceModel:
        """Copy the policy, remove the copy's adapter, and freeze it.

        The copy of a compiled policy keeps an adapter of zeros, so that both round alike; that of
        a policy which was trained from a LoRA keeps the adapter of the start.
        """
        copied: Any = copy.deepcopy(policy)
        if is_compiled(policy) or kept_start(policy):
            reset_adapter(copied)
            return _Frozen(copied)
        return _Frozen(copied.unload().requires_grad_(False).train(policy.training))


@final
class _Frozen(ReferenceModel):
    def __init__(self, network: nn.Module) -> None:
        self._network = network

    @contextmanager
    def network(self) -> Iterator[nn.Module]:
        """Yield the copy."""
        yield self._network
