"""Wrappers of `forward` nest in one order, replace each other, and follow deep copies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from dpo_video.memory.hooks import is_wrapped, wrap_forward


def named(name: str, log: list[str]) -> Any:
    def wrapper(forward: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        log.append(name)
        return forward(module, *args, **kwargs)

    return wrapper


def test_wrappers_nest_in_the_order_of_modes() -> None:
    log: list[str] = []
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    keys, expected = layer.state_dict().keys(), layer(x)
    for mode in ("unpack", "checkpoint", "compile"):
        wrap_forward(layer, mode, named(mode, log))  # type: ignore[arg-type]
    assert torch.equal(layer(x), expected) and layer.state_dict().keys() == keys
    assert log == ["checkpoint", "compile", "unpack"]
    wrap_forward(layer, "compile", named("again", log))
    wrap_forward(layer, "unpack", None)
    log.clear()
    layer(x)
    assert log == ["checkpoint", "again"]
    assert is_wrapped(layer, "compile") and not is_wrapped(layer, "unpack")


def test_a_deep_copy_runs_its_own_forward() -> None:
    layer, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    wrap_forward(layer, "checkpoint", named("", []))
    copied = copy.deepcopy(layer)
    copied.weight.data.zero_()
    assert not copied(x).any() and layer(x).any()
    wrap_forward(copied, "checkpoint", None)
    assert is_wrapped(layer, "checkpoint") and not is_wrapped(copied, "checkpoint")


def test_a_forward_set_on_the_instance_is_kept() -> None:
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: 2 * x  # type: ignore[method-assign]
    wrap_forward(layer, "checkpoint", named("", []))
    assert torch.equal(layer(torch.ones(1, 2)), torch.full((1, 2), 2.0))
