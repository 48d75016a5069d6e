"""Peak memory and operations of a computation, counted on tensor shapes.

Under `Memoryless`, a step of any size is measured on any machine, in seconds and without its
memory:

    with Memoryless(), cuda_autocast(torch.float16):
        network = ...
        peak = peak_bytes(step, networks=[network], optimizer=optimizer)

Only tensors count: not a GPU's context, libraries' workspaces or the allocator's fragmentation.
Tensors made inside `on_host` count as CPU memory, separately. With `trace=True`, `holders` lists
the tensors alive at the peak.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import jaxtyping
import torch
from torch import Tensor, UntypedStorage, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_video.memory import cuda_autocast
from dpo_video.support import memoryless
from dpo_video.support.memoryless import Memoryless, flops_of

Kind = Literal["weights", "gradients", "optimizer", "activations", "host"]

BLOCK = 512  # bytes: torch's CUDA allocator rounds sizes up to multiples of it
# Files left out of a trace; "<@" is the code of type checks.
_OURS = (__file__, cuda_autocast.__file__, memoryless.__file__)
_OUTSIDE = (*torch.__path__, *jaxtyping.__path__, *_OURS, "<@")
_LINES = 4  # of a trace


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Tensors alive at the peak that the same lines made, with the same shape and dtype."""

    bytes: int
    """Their sum."""
    count: int
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    operation: str
    """The operation that made them, or that first used them where they are inputs."""
    lines: str
    """The lines that called it, the innermost first, without torch's own."""

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:9.1f} MiB = {self.count:3} x {list(self.shape)} {self.dtype}"
        return f"{size} {self.kind} {self.operation} {self.lines}"


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes alive at the moment of the largest total, and operations of the whole run."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Everything else: inputs, tensors saved for the backward pass, temporary tensors."""
    flops: int
    """Of matrix products, convolutions and attention; a multiplication and an addition are two."""
    host: int = 0
    """Largest number of bytes in CPU memory at any moment; not in the total."""
    holders: tuple[Holder, ...] = ()
    """With `trace`: the tensors alive at the peak, the largest first."""

    @property
    def total(self) -> int:
        """Bytes on the device: weights, gradients, optimizer state and activations."""
        return self.weights + self.gradients + self.optimizer + self.activations


def peak_bytes(
    run: Callable[[], None],
    *,
    networks: Iterable[nn.Module] = (),
    optimizer: Optimizer | None = None,
    weights: Iterable[Tensor] = (),
    host: Iterable[Tensor] = (),
    trace: bool = False,
) -> Peak:
    """Run a computation and return the peak of its memory.

    Args:
        run: A step or several. Tensors that it makes count from when they are made, its inputs
            from when they are first used.
        networks: Their parameters and buffers count throughout, as weights.
        optimizer: Its state is made first, as it exists in all steps but the first. The gradients
            of its parameters count as gradients.
        weights: Further tensors that count throughout, as weights.
        host: Tensors that are in CPU memory throughout.
        trace: Also record the tensors alive at the peak, and the lines that made them.
    """
    counter = _Tracer() if trace else _Counter()
    for network in networks:
        counter.see([*network.parameters(), *network.buffers()], "weights")
    counter.see(weights, "weights")
    counter.see(host, "host")
    hooks = []
    if optimizer is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        _fill_state(optimizer, parameters)
        where: Kind = "host" if getattr(optimizer, "on_host", False) else "optimizer"
        counter.see(tree_leaves(list(optimizer.state.values())), where)
        counter.see([p.grad for p in parameters if p.grad is not None], "gradients")
        hooks = [
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: counter.see([parameter.grad], "gradients")
            )
            for parameter in parameters
        ]
    _counters.append(counter)
    try:
        with counter.watch():
            run()
    finally:
        _counters.pop()
        for hook in hooks:
            hook.remove()
    return Peak(**counter.peak, flops=counter.flops, host=counter.host, holders=counter.holders())


def allocated(size: int) -> int:
    """Bytes that the allocator takes for a tensor of `size` bytes."""
    return BLOCK * math.ceil(size / BLOCK)


_counters: list[_Counter] = []


def counting() -> _Counter:
    """The counter of the computation that `peak_bytes` runs now."""
    return _counters[-1]


_host_contexts: list[None] = []


@contextmanager
def on_host() -> Iterator[None]:
    """Count the tensors made inside as CPU memory, also where every tensor is on the CPU."""
    _host_contexts.append(None)
    try:
        yield
    finally:
        _host_contexts.pop()


def _fill_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """Make the state that the first step makes, without changing parameters or gradients."""
    if optimizer.state:
        return
    kept = [(parameter.grad, parameter.detach().clone()) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter, (grad, value) in zip(parameters, kept, strict=True):
            parameter.grad = grad
            parameter.copy_(value)


class _Watched(TorchDispatchMode):
    """Passes every operation below autograd, forward and backward, to a counter."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        used = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        self.counter.operation(func, used, flops_of(func, args, kwargs, result))
        return result


@dataclass
class Rise:
    """How far the bytes alive rise above a level at most, and the operations meanwhile."""

    device: int = 0
    host: int = 0
    flops: int = 0


class _Counter:
    """Counts the storages alive at every operation."""

    def __init__(self) -> None:
        self.flops = self.host = self.total = 0
        self.alive: dict[Kind, int] = dict.fromkeys(get_args(Kind), 0)
        self.peak = self._on_device()
        self._most = 0
        self._storages: dict[int, tuple[weakref.ref[UntypedStorage], int, Kind]] = {}
        self._highest: list[list[int]] = []
        """Largest bytes on the device and in CPU memory within each `rise`, the innermost last."""

    @property
    def level(self) -> tuple[int, int]:
        """Bytes alive now, on the device and in CPU memory."""
        return self.total, self.alive["host"]

    @contextmanager
    def rise(self) -> Iterator[Rise]:
        """Measure what happens inside; the result is complete when the context ends."""
        found, flops = Rise(), self.flops
        device, host = self.level
        self._highest.append(list(self.level))
        try:
            yield found
        finally:
            highest = self._highest.pop()
            if self._highest:
                self._highest[-1][:] = map(max, self._highest[-1], highest)
            found.device, found.host = highest[0] - device, highest[1] - host
            found.flops = self.flops - flops

    def add(self, rise: Rise, above: tuple[int, int] | None = None) -> None:
        """Count what a `rise` measured, as if it happened now, or above another level."""
        device, host = above or self.level
        self.flops += rise.flops
        self.host = max(self.host, host + rise.host)
        self._reach(device + rise.device, host + rise.host)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What happens inside is not counted, except by each `rise` inside."""
        kept = self.flops, self.host, self._most, self.peak, self._highest
        self._highest = []
        try:
            yield
        finally:
            self.flops, self.host, self._most, self.peak, self._highest = kept

    def _reach(self, device: int, host: int) -> None:
        """Note that so many bytes are alive."""
        if self._highest:
            highest = self._highest[-1]
            if device > highest[0] or host > highest[1]:
                highest[:] = max(device, highest[0]), max(host, highest[1])
        if device > self._most:
            self._most = device
            self.peak = self._on_device()
            self.peak["activations"] += device - self.total
            self.at_peak()

    def watch(self) -> AbstractContextManager[Any]:
        """Inside, count every operation."""
        memoryless = Memoryless.current
        return _Watched(self) if memoryless is None else memoryless.watched_by(self.operation)

    def operation(self, func: Any, used: list[Tensor], flops: int) -> None:
        """Count an operation, by its inputs and results."""
        self.flops += flops
        self.see(used)

    def see(self, values: Iterable[Tensor], kind: Kind | None = None) -> None:
        """Count storages not seen before; with a kind, also move known storages to it."""
        for value in values:
            storage = value.untyped_storage()
            key = id(storage)
            seen = self._storages.get(key)
            if seen is None:
                size = allocated(storage.nbytes())
                counted = kind or ("host" if _host_contexts else "activations")
                reference = weakref.ref(storage, partial(self.forget, key))
                self._storages[key] = reference, size, counted
                self._count(counted, size)
                self.appeared(key, value, size, counted)
            elif kind is not None and seen[2] != kind:
                reference, size, before = seen
                self._storages[key] = reference, size, kind
                self._count(before, -size)
                self._count(kind, size)
        if self.total > self._most or self._highest:
            self._reach(*self.level)

    def forget(self, key: int, _: object) -> None:
        """Called when a storage is freed."""
        _, size, kind = self._storages.pop(key)
        self._count(kind, -size)

    def appeared(self, key: int, value: Tensor, size: int, kind: Kind) -> None:
        """Called for a new storage."""

    def at_peak(self) -> None:
        """Called when the total is the largest so far."""

    def holders(self) -> tuple[Holder, ...]:
        """The tensors alive at the peak."""
        return ()

    def _count(self, kind: Kind, size: int) -> None:
        self.alive[kind] += size
        if kind == "host":
            self.host = max(self.host, self.alive[kind])
        else:
            self.total += size

    def _on_device(self) -> dict[str, int]:
        return {kind: size for kind, size in self.alive.items() if kind != "host"}


@dataclass
class _Life:
    """Lifetime of a storage, in operations."""

    born: int
    died: int | None
    size: int
    made: tuple[Kind, tuple[int, ...], torch.dtype, str, str]


class _Tracer(_Counter):
    """Also records the lifetime of each storage, and the operation that made it."""

    def __init__(self) -> None:
        super().__init__()
        self._now = self._peak_at = 0
        self._operation = "input"
        self._lives: list[_Life] = []
        self._living: dict[int, _Life] = {}

    def operation(self, func: Any, used: list[Tensor], flops: int) -> None:
        """Count an operation."""
        self._operation = str(func)
        self._now += 1
        super().operation(func, used, flops)

    def appeared(self, key: int, value: Tensor, size: int, kind: Kind) -> None:
        """Record its birth."""
        made = kind, tuple(value.shape), value.dtype, self._operation, _lines(sys._getframe())
        self._living[key] = _Life(self._now, None, size, made)
        self._lives.append(self._living[key])

    def forget(self, key: int, _: object) -> None:
        """Record its end."""
        super().forget(key, _)
        self._living.pop(key).died = self._now

    def at_peak(self) -> None:
        """Record when."""
        self._peak_at = self._now

    def holders(self) -> tuple[Holder, ...]:
        """The tensors alive at the peak."""
        sizes: Counter[Any] = Counter()
        counts: Counter[Any] = Counter()
        for life in self._lives:
            if life.born <= self._peak_at and (life.died is None or life.died >= self._peak_at):
                sizes[life.made] += life.size
                counts[life.made] += 1
        return tuple(
            Holder(
                bytes=size, count=counts[made], kind=made[0], shape=made[1], dtype=made[2],
                operation=made[3], lines=made[4],
            )
            for made, size in sizes.most_common()
        )  # fmt: skip


def _lines(frame: FrameType | None) -> str:
    lines: list[str] = []
    while frame is not None and len(lines) < _LINES:
        file = frame.f_code.co_filename
        if not file.startswith(_OUTSIDE):
            lines.append(f"{Path(file).name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)
