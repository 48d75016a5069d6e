"""How many bytes are alive at once while something runs, and how many operations it takes.

Both are counted on shapes, so that under `FakeTensorMode` a step of any size is measured on any
machine, in seconds and without its memory:

    with FakeTensorMode(), as_on_cuda(torch.float16):
        network = ...
        peak = peak_bytes(step, networks=[network], optimizer=optimizer)

What no tensor holds is not counted: a GPU's own context, libraries' workspaces, and what the
allocator loses to fragments. What is made inside `on_host` is counted apart, as the host's.
`peak_bytes(step, trace=True).holders` says what fills the worst moment.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import jaxtyping
import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

Kind = Literal["weights", "gradients", "optimizer", "activations", "host"]

BLOCK = 512  # bytes: torch's CUDA allocator hands out multiples of it
# Whose lines say nothing in a trace; the last is what checks of types are compiled to.
_OUTSIDE = (*torch.__path__, *jaxtyping.__path__, __file__, "<@")
_LINES = 4  # of a trace
# What CUDA's autocast runs in fp32 and the CPU's does not, of what networks are made of
# (ATen/autocast_mode.h, AT_FORALL_FP32). Their results, in twice the bytes, are activations.
_IN_FP32: frozenset[Callable[..., Any]] = frozenset({
    F.group_norm, F.layer_norm, F.interpolate, F.softmax, F.log_softmax, F.softplus,
    *([F.rms_norm] if hasattr(F, "rms_norm") else []),
    torch.group_norm, torch.layer_norm, torch.softmax, torch.pow, torch.exp, torch.rsqrt,
    torch.reciprocal, torch.sum,
    Tensor.pow, Tensor.__pow__, Tensor.exp, Tensor.rsqrt, Tensor.softmax, Tensor.sum,
})  # fmt: skip
_aten = torch.ops.aten
# torch counts the attention of GPUs only; that of the CPU is the same one.
_SAME_FLOPS: Mapping[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _aten._scaled_dot_product_flash_attention_backward
    ),
}


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Tensors that were alive at the worst moment, made alike."""

    bytes: int
    """Of all of them."""
    count: int
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    operation: str
    """That made them; of what was given, the one that first used them."""
    lines: str
    """That called it, the innermost first, torch's own left out."""

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:9.1f} MiB = {self.count:3} x {list(self.shape)} {self.dtype}"
        return f"{size} {self.kind} {self.operation} {self.lines}"


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment at which most was alive, in bytes; and the operations of everything."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """All else: inputs, what waits for its backward, and what is being computed."""
    flops: int
    """A multiplication and an addition are two; only those of matrix products, convolutions and
    attention count."""
    host: int = 0
    """Bytes in the host's memory, at the moment when most were there; not in the total."""
    holders: tuple[Holder, ...] = ()
    """With `trace`: what was alive, the largest first."""

    @property
    def total(self) -> int:
        """The sum of the four."""
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
    """Run something, and say how much was alive at its worst moment.

    Args:
        run: A step or several. Tensors that it makes count from when they are made, those that it
            is given from when they are first used.
        networks: Their parameters and buffers are there throughout, as weights.
        optimizer: Its state is made first, as it is there in all steps but the first. Of its
            parameters, gradients are told apart.
        weights: More that are there throughout, in no network.
        host: What is in the host's memory throughout.
        trace: Also say what was alive then, and which lines made it.
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
        counter.see([parameter.grad for parameter in parameters], "gradients")
        hooks = [
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: counter.see([parameter.grad], "gradients")
            )
            for parameter in parameters
        ]
    try:
        with counter:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return Peak(**counter.peak, flops=counter.flops, host=counter.host, holders=counter.holders())


_elsewhere: list[None] = []


@contextmanager
def on_host() -> Iterator[None]:
    """Tensors made inside lie in the host's memory.

    Where a step runs on the CPU, or on shapes as if on a GPU, only this tells the two apart.
    """
    _elsewhere.append(None)
    try:
        yield
    finally:
        _elsewhere.pop()


def _fill_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """Leave the state that a first step leaves, and nothing else of it."""
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


class _Counter(TorchDispatchMode):
    """Sees every operation below autograd, forward and backward, and what each storage becomes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.host = self.total = 0
        self.alive: dict[Kind, int] = dict.fromkeys(get_args(Kind), 0)
        self.peak = self._on_device()
        self._worst = 0
        self._held: dict[int, tuple[weakref.ref[UntypedStorage], int, Kind]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        formula = flop_registry.get(_SAME_FLOPS.get(packet, packet))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        self.see(tree_leaves((args, kwargs, result)))
        return result

    def see(self, values: Iterable[Any], kind: Kind | None = None) -> None:
        """Count what is new among the tensors; with a kind, move what is known to it."""
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key = id(storage)
            known = self._held.get(key)
            if known is None:
                size = BLOCK * math.ceil(storage.nbytes() / BLOCK)
                counted = kind or ("host" if _elsewhere else "activations")
                reference = weakref.ref(storage, partial(self.forget, key))
                self._held[key] = reference, size, counted
                self._count(counted, size)
                self.appeared(key, value, size, counted)
            elif kind is not None and known[2] != kind:
                reference, size, before = known
                self._held[key] = reference, size, kind
                self._count(before, -size)
                self._count(kind, size)
        if self.total > self._worst:
            self._worst = self.total
            self.peak = self._on_device()
            self.at_worst()

    def forget(self, key: int, _: object) -> None:
        """A storage is gone."""
        _, size, kind = self._held.pop(key)
        self._count(kind, -size)

    def appeared(self, key: int, value: Tensor, size: int, kind: Kind) -> None:
        """A storage is new."""

    def at_worst(self) -> None:
        """More is alive than ever before."""

    def holders(self) -> tuple[Holder, ...]:
        """What was alive at the worst moment."""
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
    """Of a storage, in calls of the tracer."""

    born: int
    died: int | None
    size: int
    made: tuple[Kind, tuple[int, ...], torch.dtype, str, str]


class _Tracer(_Counter):
    """Remembers from when to when each storage lived, and who made it."""

    def __init__(self) -> None:
        super().__init__()
        self._now = self._worst_at = 0
        self._operation = "given"
        self._lives: list[_Life] = []
        self._living: dict[int, _Life] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._operation = str(func)
        self._now += 1
        return super().__torch_dispatch__(func, types, args, kwargs)

    def appeared(self, key: int, value: Tensor, size: int, kind: Kind) -> None:
        """Note it."""
        made = kind, tuple(value.shape), value.dtype, self._operation, _lines(sys._getframe())
        self._living[key] = _Life(self._now, None, size, made)
        self._lives.append(self._living[key])

    def forget(self, key: int, _: object) -> None:
        """Note that, too."""
        super().forget(key, _)
        self._living.pop(key).died = self._now

    def at_worst(self) -> None:
        """Note when."""
        self._worst_at = self._now

    def holders(self) -> tuple[Holder, ...]:
        """Those that had been born and had not died."""
        sizes: Counter[Any] = Counter()
        counts: Counter[Any] = Counter()
        for life in self._lives:
            if life.born <= self._worst_at and (life.died is None or life.died >= self._worst_at):
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


@contextmanager
def as_on_cuda(dtype: torch.dtype) -> Iterator[None]:
    """The CPU's autocast with the choices of CUDA's, to count on a CPU what a GPU would hold."""
    with torch.autocast("cpu", dtype), choosing_as_cuda():
        yield


@contextmanager
def choosing_as_cuda() -> Iterator[None]:
    """Any autocast of the CPU's inside makes the choices of CUDA's.

    They differ in what runs in fp32: on a GPU the norms do, and the nearest-neighbour upsampling.
    That holds here, and in what checkpointing runs again, where torch has taken modes off.
    """
    mode: TorchFunctionMode = _InFp32()
    entered: list[bool] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        entered.append(not _get_current_function_mode_stack())
        if entered[-1]:
            mode.__enter__()

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if entered.pop():
            mode.__exit__(None, None, None)

    hooks = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _InFp32(TorchFunctionMode):
    """Hands fp32 to the functions that CUDA's autocast hands it to."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _IN_FP32:
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _widened(tensor: Tensor) -> Tensor:
    narrow = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if narrow and torch.is_autocast_enabled("cpu") else tensor
