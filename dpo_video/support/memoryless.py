"""Tensors without memory: what an operation would return on a CPU, without computing it.

Under `Memoryless`, a tensor has a shape, strides, a dtype and a storage of the right size, whose
bytes do not exist: all storages begin at the same address. So a step of any size runs on any
machine. torch's `FakeTensorMode` does the same with a subclass of tensors and takes several times
as long. Here it is asked once for each operation and shapes of its inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_READABLE = 2**30  # bytes, of zeros, for code that reads values all the same
_CPU = torch.device("cpu")
# torch counts the attention kernels of GPUs only; the CPU's have the same operations.
_SAME_FLOPS: Mapping[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _aten._scaled_dot_product_flash_attention_backward
    ),
}

Observer = Callable[[Any, list[Tensor], int], None]
"""Called with an operation, its inputs and results, and its number of operations."""


@cache
def _formula(func: Any) -> Any:
    return flop_registry.get(_SAME_FLOPS.get(func._overloadpacket, func._overloadpacket))


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Operations of a matrix product, a convolution or attention; 0 for everything else."""
    formula = _formula(func)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


class _Dispatch:
    """torch wraps the handler of a mode in a call to its compiler; not one that a mode inherits."""

    _observers: list[Observer]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, used, flops = self._run(func, args, kwargs or {})
        if self._observers:
            if isinstance(result, Tensor):
                used.append(result)
            elif isinstance(result, (list, tuple)):
                used += [each for each in result if isinstance(each, Tensor)]
            for observe in self._observers:
                observe(func, used, flops)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor], int]:
        raise NotImplementedError


class Memoryless(_Dispatch, TorchDispatchMode):
    """Inside, operations return tensors without memory.

    Operations on tensors that have memory run as ever: constants keep their values.
    """

    current: Memoryless | None = None
    """The mode that is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._assume_true = False
        self._readable, self._bytes = _nowhere()
        self._address = self._readable.ctypes.data
        self._fakes = FakeTensorMode()
        self._observers: list[Observer] = []
        self._outer: list[Memoryless | None] = []

    def __enter__(self) -> Self:
        """Enter the mode."""
        self._outer.append(Memoryless.current)
        Memoryless.current = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the mode."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        Memoryless.current = self._outer.pop()

    @staticmethod
    @contextmanager
    def assumed_true() -> Iterator[None]:
        """Inside, comparisons of values are true; outside, they are errors."""
        mode = Memoryless.current
        assert mode is not None
        before, mode._assume_true = mode._assume_true, True
        try:
            yield
        finally:
            mode._assume_true = before

    @contextmanager
    def watched_by(self, observer: Observer) -> Iterator[None]:
        """Inside, call an observer after every operation."""
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.pop()

    def _run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor], int]:
        """Return an operation's result, its input tensors and its number of operations."""
        key: list[Any] = [func]
        inputs: list[Tensor] = []
        _describe(args, key, inputs)
        if kwargs:
            for name, value in kwargs.items():
                key.append(name)
                _describe((value,), key, inputs)
        how = _kind(func)
        if how is _RUN:
            return func(*args, **kwargs), inputs, 0
        if inputs and not any(map(self._is_memoryless, inputs)):
            result = func(*args, **kwargs)
            return result, inputs, flops_of(func, args, kwargs, result)
        if self._assume_true and (
            func is _aten.equal.default
            or (func is _aten._local_scalar_dense.default and inputs[0].dtype is torch.bool)
        ):
            return True, inputs, 0
        found = _results.get(tuple(key))
        if found is None:
            found = _results[tuple(key)] = self._first(func, args, kwargs, how)
        if type(how) is tuple:
            written = [_argument(each, args, kwargs) for each in how]
            return written[0] if len(written) == 1 else written or None, inputs, found.flops
        return self._made(found.result), inputs, found.flops

    def _first(self, func: Any, args: Any, kwargs: Any, how: Any) -> _Found:
        """Ask torch's fake tensors what an operation returns."""
        if type(how) is tuple and _formula(func) is None:
            return _Found(None, 0)
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs))
        with self._fakes:
            result = func(*args, **kwargs)
        return _Found(tree_map(_described, result), flops_of(func, args, kwargs, result))

    def _made(self, result: Any) -> Any:
        if isinstance(result, _Tensor):
            if not result.bytes or result.device != _CPU:
                return torch.empty_strided(
                    result.shape, result.stride, dtype=result.dtype, device=result.device
                )
            whole = torch.frombuffer(self._bytes[: result.bytes], dtype=result.dtype)
            if result.contiguous:
                return whole.resize_(result.shape)
            return whole.set_(whole.untyped_storage(), 0, result.shape, result.stride)
        if isinstance(result, (list, tuple)):
            return type(result)(self._made(each) for each in result)
        return result

    def _is_memoryless(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self._address

    def _fake(self, tensor: Tensor) -> FakeTensor:
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self._fakes, like, tensor.device)


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A tensor that an operation returns."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bytes: int
    """Of its storage."""
    contiguous: bool


@dataclass(frozen=True)
class _Found:
    """What an operation returns, and its number of operations."""

    result: Any
    flops: int


@cache
def _nowhere() -> tuple[NDArray[np.uint8], memoryview]:
    """Some bytes, and a buffer that begins with them and is larger than any memory."""
    readable = np.empty(_READABLE, np.uint8)
    return readable, memoryview((ctypes.c_ubyte * 2**62).from_address(readable.ctypes.data))


_results: dict[tuple[Any, ...], _Found] = {}
_RUN, _FRESH = "run", "fresh"


def _describe(values: Sequence[Any], key: list[Any], tensors: list[Tensor]) -> None:
    """Append what an operation's result depends on, and the tensors."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            key.append((value.shape, value.stride(), value.dtype, value.device))
        elif isinstance(value, (list, tuple)):
            key.append(len(value))
            _describe(value, key, tensors)
        else:
            key.append(value.__class__)  # 1, 1.0 and True are equal
            key.append(value)


@cache
def _kind(func: Any) -> Any:
    """How results are made.

    By running the operation, which makes only views or has no tensors; as fresh tensors; or as the
    arguments written to, given by position and name.
    """
    arguments, returns = func._schema.arguments, func._schema.returns
    if not any("Tensor" in str(each.type) for each in (*arguments, *returns)):
        return _RUN
    aliases = [each.alias_info for each in returns]
    if func is _aten._unsafe_view.default or torch.Tag.inplace_view in func.tags:
        return _RUN
    if any(alias is not None and not alias.is_write for alias in aliases):
        return _RUN
    if any(alias is not None for alias in aliases):
        return tuple(
            next(
                (position, argument.name)
                for position, argument in enumerate(arguments)
                if argument.alias_info is not None
                and argument.alias_info.before_set == alias.before_set
            )
            for alias in aliases
        )
    return _FRESH


def _argument(which: tuple[int, str], args: Any, kwargs: Any) -> Any:
    position, name = which
    return args[position] if position < len(args) else kwargs[name]


def _described(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Tensor(
        shape=tuple(value.shape),
        stride=value.stride(),
        dtype=value.dtype,
        device=value.device,
        bytes=value.untyped_storage().nbytes(),
        contiguous=value.is_contiguous(),
    )
