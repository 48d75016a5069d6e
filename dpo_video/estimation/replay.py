"""Forward and backward passes that are traced once and counted again wherever they recur.

A step runs equal passes several times: the reference on both videos, the policy without a graph,
and with `split` and `linear` the policy's forward and backward passes, one video after the other.
Every mode repeats some of those of another. An equal pass rises above the bytes alive before it by
the same amount and has the same operations, so that one trace of it is enough.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from dpo_video.diffusion.experts import Experts
from dpo_video.estimation.equal_blocks import adapters
from dpo_video.memory.peak import Rise, counting
from dpo_video.settings import MemorySettings
from dpo_video.strategies import VideoModel
from dpo_video.types import Context


@dataclass(frozen=True)
class _Forward:
    """What a traced forward pass did."""

    rise: Rise
    shape: torch.Size
    dtype: torch.dtype


class _Result(torch.autograd.Function):
    """The result of a forward pass that did not run. Its gradient goes nowhere."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, known: _Forward) -> Tensor:
        return torch.empty(known.shape, dtype=known.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True)
class _Backward:
    """What a traced backward pass did."""

    rise: Rise
    kept: tuple[int, int]
    """Bytes on the device and in CPU memory that the forward pass left for it."""
    given: list[bool]
    """Which trained parameters had a gradient after it."""


@final
@dataclass
class Replays:
    """The passes of a model that were traced so far."""

    forward: dict[Hashable, _Forward] = field(default_factory=dict)
    backward: dict[Hashable, _Backward] = field(default_factory=dict)


@dataclass
class _Pending:
    """A forward pass with a graph, whose backward pass comes next."""

    key: Hashable
    before: tuple[int, int]
    """Bytes alive before it."""
    kept: tuple[int, int] = (0, 0)


@final
class Replay:
    """Traces the passes of one step, or counts equal ones again."""

    def __init__(
        self,
        model: VideoModel,
        replays: Replays,
        memory: MemorySettings,
        trained: list[nn.Parameter],
    ) -> None:
        self._model, self._replays, self._memory, self._trained = model, replays, memory, trained
        # Of two experts, the timestep chooses one and moves the other.
        self._off = any(isinstance(module, Experts) for module in model.denoiser.modules())
        self._pending: _Pending | None = None

    def model(self) -> VideoModel:
        """The model, with `predict` of this object."""
        model = copy.copy(self._model)
        vars(model)["predict"] = self.predict
        return model

    @contextmanager
    def around(self, autocast: AbstractContextManager[Any]) -> Iterator[None]:
        """The autocast of a forward pass, whose casts are freed when it ends."""
        with autocast:
            yield
        if self._pending is not None:
            alive = counting().level
            device, host = self._pending.before
            self._pending.kept = alive[0] - device, alive[1] - host

    def predict(
        self, network: nn.Module, noisy: Tensor, timestep: Tensor, context: Context
    ) -> Tensor:
        """Predict as the model does, or count an equal forward pass again."""
        with_graph = torch.is_grad_enabled()
        # In `joint` mode a step has only one pass with a graph.
        if self._off or (with_graph and self._memory.backward == "joint"):
            return self._model.predict(network, noisy, timestep, context)
        key: Hashable = (
            id(network), _adapter_is_off(network), noisy.shape, self._memory.forward_chunks
        )  # fmt: skip
        counter = counting()
        if with_graph:
            key = key, self._memory, [p.grad is None for p in self._trained].count(True)
            self._pending = _Pending(key, counter.level)
        known = self._replays.forward.get(key)
        if known is None:
            with counter.rise() as rise:
                result = self._model.predict(network, noisy, timestep, context)
            self._replays.forward[key] = _Forward(rise, result.shape, result.dtype)
            return result
        counter.add(known.rise)
        leaf = torch.empty(0, requires_grad=with_graph)
        empty: Tensor = _Result.apply(leaf, known)  # type: ignore[no-untyped-call]
        return empty

    def backward(self, scalar: Tensor) -> None:
        """Run the backward pass, or count an equal one again."""
        # Tensor.backward disables function modes, which recomputed blocks need.
        pending, self._pending = self._pending, None
        known = None if pending is None else self._replays.backward.get(pending.key)
        counter = counting()
        level = counter.level
        with counter.rise() as rise:
            torch.autograd.backward(scalar)  # of the error alone, if the forward pass did not run
        if pending is None:
            return
        if known is None:
            given = [p.grad is not None for p in self._trained]
            self._replays.backward[pending.key] = _Backward(rise, pending.kept, given)
            return
        device, host = (
            before + mine - here
            for before, mine, here in zip(level, known.kept, pending.kept, strict=True)
        )
        counter.add(known.rise, above=(device, host))
        for parameter, has_gradient in zip(self._trained, known.given, strict=True):
            if has_gradient and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
                counter.see([parameter.grad], "gradients")


def _adapter_is_off(network: nn.Module) -> bool:
    return any(each.disable_adapters for each in adapters(network))
