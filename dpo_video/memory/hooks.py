"""Wrappers of a module's `forward`: the one way in which memory modes change how a module runs.

A module's wrappers nest in the order of `Mode`, the first one outermost, whatever the order in
which they were set. Parameters keep their names, and a deep copy of a network is wrapped as the
network is. Other mechanisms lack one of the two: torch's `checkpoint_wrapper` puts a module around
another, which adds a prefix to parameter names; hooks of diffusers' `HookRegistry` stay bound to
the module that they were registered on, so that a deep copy would run the original's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Literal, get_args

from torch import nn

Mode = Literal["checkpoint", "compile", "chunk", "unpack"]


def wrap_forward(module: nn.Module, mode: Mode, wrapper: Callable[..., Any] | None) -> None:
    """Set a mode's wrapper, in place of an earlier one; None removes it.

    Args:
        module: Any module.
        mode: What the wrapper is for.
        wrapper: Called as `wrapper(forward, module, *args, **kwargs)`, where
            `forward(module, *args, **kwargs)` runs the inner wrappers and the module itself.
    """
    state: Any = vars(module)
    if "_wrappers" not in state:
        state["_wrappers"], state["_own_forward"] = {}, state.get("forward")
    wrappers = state["_wrappers"]
    wrappers[mode] = wrapper
    own = state["_own_forward"]  # set by another library, on the instance
    forward = type(module).forward if own is None else partial(_bound, own)
    for name in reversed(get_args(Mode)):
        if wrappers.get(name) is not None:
            forward = partial(wrappers[name], forward)
    state["_wrapped_forward"], state["forward"] = forward, MethodType(_forward, module)


def is_wrapped(network: nn.Module, mode: Mode) -> bool:
    """Whether any module of a network has the wrapper."""
    return any(vars(module).get("_wrappers", {}).get(mode) for module in network.modules())


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module._wrapped_forward(module, *args, **kwargs)


def _bound(forward: Callable[..., Any], module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)
