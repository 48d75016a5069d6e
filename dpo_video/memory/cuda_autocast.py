"""The autocast of CUDA on a CPU: what a GPU would compute in fp32 is computed in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

# Functions that CUDA's autocast runs in fp32 and the CPU's does not, as far as networks use them
# (ATen/autocast_mode.h, AT_FORALL_FP32). Their results take twice the bytes.
_IN_FP32: frozenset[Callable[..., Any]] = frozenset({
    F.group_norm, F.layer_norm, F.interpolate, F.softmax, F.log_softmax, F.softplus,
    *([F.rms_norm] if hasattr(F, "rms_norm") else []),
    torch.group_norm, torch.layer_norm, torch.softmax, torch.pow, torch.exp, torch.rsqrt,
    torch.reciprocal, torch.sum,
    Tensor.pow, Tensor.__pow__, Tensor.exp, Tensor.rsqrt, Tensor.softmax, Tensor.sum,
})  # fmt: skip


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocast on the CPU by CUDA's rules, to count on a CPU the bytes that a GPU would hold."""
    with torch.autocast("cpu", dtype), cuda_autocast_rules():
        yield


@contextmanager
def cuda_autocast_rules() -> Iterator[None]:
    """Inside, autocast on the CPU follows CUDA's rules.

    On a GPU norms and nearest-neighbour upsampling run in fp32. The hooks keep that in what
    checkpointing recomputes, where torch has removed function modes.
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
    """Casts the inputs of the functions that CUDA's autocast runs in fp32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _IN_FP32:
            args = tuple(_widened(each) for each in args)
            kwargs = {name: _widened(each) for name, each in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _widened(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if narrow and torch.is_autocast_enabled("cpu") else value
