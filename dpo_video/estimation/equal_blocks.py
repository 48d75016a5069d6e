"""Blocks that are traced once and counted again wherever an equal one runs.

A network repeats blocks of the same layers on inputs of the same shapes, and a layer that runs in
chunks repeats itself. Where such a part is checkpointed, it is one node of the graph: it keeps its
inputs, and everything else exists only while it runs. So one trace of its forward pass and of its
recomputation with the backward pass stands for all equal ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpo_video.memory.blocks import checkpointed_by
from dpo_video.memory.packed_weights import PackedWeight
from dpo_video.memory.peak import Rise, allocated, counting

Run = Callable[..., Any]


@dataclass(frozen=True)
class _Part:
    """What a traced part did."""

    forward: Rise
    backward: Rise
    """Without the gradient of its result."""
    results: list[_Spec]
    structure: Any


@final
class EqualBlocks:
    """The checkpointed parts of a network that were traced so far."""

    def __init__(self) -> None:
        self._parts: dict[Hashable, _Part | None] = {}
        self._signatures: dict[int, Hashable] = {}

    @contextmanager
    def counted(self, mode: Hashable) -> Iterator[None]:
        """Inside, checkpointed parts that equal a traced one are counted and do not run.

        Args:
            mode: What else the parts depend on.
        """

        def run(checkpointed: Run, module: nn.Module, args: Any, kwargs: Any) -> Any:
            return self._run(mode, checkpointed, module, args, kwargs)

        with checkpointed_by(run):
            yield

    def _run(
        self, mode: Hashable, checkpointed: Run, module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        values, structure = tree_flatten((args, kwargs))
        trained = [p for p in module.parameters() if p.requires_grad]
        with_graph = torch.is_grad_enabled()
        key = (
            mode, self._signature(module), str(structure), tuple(map(_described, values)),
            tuple(parameter.grad is None for parameter in trained),
            torch.is_autocast_enabled("cpu"), with_graph,
            any(each.disable_adapters for each in adapters(module)),
        )  # fmt: skip
        if key not in self._parts:
            if not with_graph:
                return self._first(key, checkpointed, args, kwargs)
            self._parts[key] = _trace(checkpointed, values, structure, trained)
        part = self._parts[key]
        if part is None:
            return checkpointed(*args, **kwargs)
        if not with_graph:
            counting().add(part.forward)
            return tree_unflatten([each.empty() for each in part.results], part.structure)
        tensors = [value for value in values if isinstance(value, Tensor)]
        # First: a recomputation may end with the last inputs that it has to keep.
        kept = _Kept.apply(torch.empty(0, requires_grad=True), *tensors)  # type: ignore[no-untyped-call]
        results = _Counted.apply(part, kept.grad_fn, len(tensors), *tensors, *trained)  # type: ignore[no-untyped-call]
        return tree_unflatten(list(results), part.structure)

    def _first(self, key: Hashable, run: Run, args: Any, kwargs: Any) -> Any:
        """Run and trace a part without a graph."""
        with counting().rise() as rise:
            result = run(*args, **kwargs)
        found, layout = tree_flatten(result)
        known = all(isinstance(each, Tensor) for each in found)
        results = [_Spec.of(each) for each in found] if known else []
        self._parts[key] = _Part(rise, Rise(), results, layout) if known else None
        return result

    def _signature(self, module: nn.Module) -> Hashable:
        """What equal blocks have in common."""
        if id(module) not in self._signatures:
            self._signatures[id(module)] = tuple(map(_layer, module.modules()))
        return self._signatures[id(module)]


def adapters(module: nn.Module) -> Iterator[BaseTunerLayer]:
    """The layers of a network that have an adapter."""
    return (each for each in module.modules() if isinstance(each, BaseTunerLayer))


def _layer(module: nn.Module) -> Hashable:
    tensors = (*module._parameters.items(), *module._buffers.items())
    packed = getattr(module, "packed_weight", None)
    return (
        type(module),
        module.extra_repr(),
        tuple(
            (name, value.shape, value.dtype, value.requires_grad)
            for name, value in tensors if value is not None
        ),
        (packed.shape, packed.base, packed.on_host) if isinstance(packed, PackedWeight) else None,
        tuple(
            (name, value) for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and name != "_disable_adapters"
        ),
    )  # fmt: skip


def _described(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.requires_grad
    return type(value), value if value.__hash__ is not None else id(value)


def _trace(
    checkpointed: Run, values: list[Any], structure: Any, trained: list[nn.Parameter]
) -> _Part | None:
    """Run a part and its backward pass beside the graph; None if it cannot be counted again."""
    held: list[Tensor] = []
    own = [_own(value, held) if isinstance(value, Tensor) else value for value in values]
    args, kwargs = tree_unflatten(own, structure)
    kept = [parameter.grad for parameter in trained]
    same = torch.autograd.graph.saved_tensors_hooks(lambda value: value, lambda value: value)
    counter = counting()
    with counter.apart():
        with same:  # in place of the hooks that move inputs to CPU memory
            with counter.rise() as forward:
                found, layout = tree_flatten(checkpointed(*args, **kwargs))
            if not all(isinstance(each, Tensor) and each.requires_grad for each in found):
                return None
            end = _Source.apply(*found)  # type: ignore[no-untyped-call]
        torch.clear_autocast_cache()  # as after a forward pass
        one = torch.ones(())
        with torch.autocast("cpu", enabled=False), counter.rise() as backward:
            torch.autograd.backward(end, one)
        for parameter, gradient in zip(trained, kept, strict=True):
            parameter.grad = gradient
    results = [_Spec.of(each) for each in found]
    backward.device -= sum(each.size for each in results)  # the gradients that the source makes
    return _Part(forward, backward, results, layout)


def _own(value: Tensor, held: list[Tensor]) -> Tensor:
    """An input apart from the graph; its gradient is held, as by the graph until it goes on."""
    if not value.requires_grad:
        return value.detach()
    leaf = torch.empty(0, requires_grad=True)
    own: Tensor = _Input.apply(leaf, value.detach(), held)  # type: ignore[no-untyped-call]
    return own


class _Input(torch.autograd.Function):
    """An input whose gradient is held and not copied."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor, held: list[Tensor]) -> Tensor:
        ctx.held = held
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.held += gradients
        return None, None, None


@dataclass(frozen=True)
class _Spec:
    """A tensor's description."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor) -> _Spec:
        """Describe a tensor."""
        return cls(value.shape, value.stride(), value.dtype)

    def empty(self) -> Tensor:
        """A tensor like it."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)

    @property
    def size(self) -> int:
        """Bytes, rounded up to the allocator's blocks."""
        return allocated(math.prod(self.shape) * self.dtype.itemsize)


class _Source(torch.autograd.Function):
    """A scalar whose backward pass makes a gradient for each of its inputs."""

    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> Tensor:
        ctx.like = [_Spec.of(value) for value in values]
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.empty() for value in ctx.like)


class _Kept(torch.autograd.Function):
    """Keeps the inputs of a part for its backward pass."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, *values: Tensor) -> Tensor:
        ctx.save_for_backward(*values)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise AssertionError("not part of the graph")


class _Counted(torch.autograd.Function):
    """A part that does not run: what it did is counted again."""

    @staticmethod
    def forward(
        ctx: Any, part: _Part, kept: Any, count: int, *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.part, ctx.kept = part, kept
        ctx.trained = [_Spec.of(value) for value in values[count:]]
        counting().add(part.forward)
        return tuple(value.empty() for value in part.results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, ctx.kept = ctx.kept.saved_tensors, None  # freed when this ends
        counting().add(ctx.part.backward)
        inputs = [_Spec.of(value) for value in values]
        every = zip((*inputs, *ctx.trained), ctx.needs_input_grad[3:], strict=True)
        return (None, None, None, *(value.empty() if needed else None for value, needed in every))
