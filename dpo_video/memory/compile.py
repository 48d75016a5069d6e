"""Blocks run by torch.compile: fewer, larger kernels instead of many small ones.

Every block is one graph, without a break; blocks of a class with the same shapes share one. A
block that does not compile is refused, and so is one with more shapes than torch has room for:
torch would otherwise run it uncompiled without notice. Checkpointing wraps the compiled block, so
that the backward pass recomputes with the same graph.

The compiler fuses a graph with a backward pass differently than one without, and one with an
adapter differently than one without: their last bits differ, and beta multiplies the difference
between policy and reference. (For a small Wan in bf16, the margin of an untrained policy was 3e-3:
8 logits.) So both run the same graphs. The reference gets an adapter that adds zeros, and a
forward pass without backward runs with an autograd graph, which is cut after every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dpo_video.errors import TrainingError, UserError
from dpo_video.memory.blocks import blocks
from dpo_video.memory.hooks import is_wrapped, wrap_forward
from dpo_video.settings import MemorySettings

BACKEND = "inductor"
GRAPHS = 256  # of one class of blocks: as many as it has shapes, some of them twice

_cuts: ContextVar[bool] = ContextVar("_cuts", default=False)


def check_compile_modes(memory: MemorySettings) -> None:
    """Check that memory.compile works with the other modes; else a UserError."""
    packed = memory.quantization != "native" or memory.shard > 1 or "blocks" in memory.offload
    if memory.compile == "on" and packed:
        # With int8, a compiled block was seen to keep the unpacked weights.
        raise UserError(
            "memory.compile=on would keep whole weights for the backward pass, where "
            "memory.quantization and memory.offload=blocks hold one layer's at a time and "
            "memory.shard one block's. Set memory.compile=off, or leave those out."
        )


def check_compile(memory: MemorySettings, device: torch.device) -> None:
    """Check that memory.compile works with the other modes and the device; else a UserError."""
    if memory.compile == "off":
        return
    check_compile_modes(memory)
    if device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise UserError(
                "memory.compile=on needs a C++ compiler for the CPU, and none is found. Install "
                "one (apt install g++, or the like), name it in CXX, or set memory.compile=off."
            ) from error
    elif device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(
                "memory.compile=on needs Triton for this GPU, and it is not installed or the GPU "
                "is too old for it (compute capability 7.0). Install it (pip install triton), or "
                "set memory.compile=off."
            )
    else:
        raise UserError(
            f"memory.compile=on is for CUDA GPUs and CPUs; what torch has for '{device.type}' has "
            "not been tried. Set memory.compile=off, or choose another --device."
        )


def compile_blocks(network: nn.Module, on: bool = True) -> int:
    """Run blocks compiled wherever gradients are enabled; return how many.

    Under torch.no_grad they run uncompiled: samples have other shapes than a step, which are not
    worth a graph. Raises torch's limit of graphs, which holds for the whole process. Another call
    replaces the effect of an earlier one.

    Args:
        network: Any network with lists of layers.
        on: False undoes it.

    Raises:
        TrainingError: if the network has no blocks.
    """
    found = list(blocks(network))
    if not found:
        raise TrainingError(
            f"A {type(network).__name__} has no blocks that could be compiled: no list of layers. "
            "Set memory.compile=off."
        )
    for block in found:
        wrap_forward(block, "compile", _compiled if on else None)
    if not on:
        return 0
    limits: Any = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, GRAPHS)
    limits.fail_on_cache_limit_hit = True
    return len(found)


def is_compiled(network: nn.Module) -> bool:
    """Whether any of its blocks runs compiled."""
    return is_wrapped(network, "compile")


@contextmanager
def without_graph(network: nn.Module) -> Iterator[None]:
    """Inside, nothing is kept for a backward pass: of a compiled network, at most one block's.

    Detach the output of a compiled network.
    """
    if not is_compiled(network):
        with torch.no_grad():
            yield
        return
    before = _cuts.set(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        _cuts.reset(before)


def _compiled(forward: Callable[..., Any], block: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(block, *args, **kwargs)
    try:
        result = _graphs(forward, BACKEND)(block, *args, **kwargs)
    except (
        torch._dynamo.exc.TorchDynamoException,
        torch._dynamo.exc.FailOnRecompileLimitHit,
    ) as error:
        raise TrainingError(
            f"A {type(block).__name__} cannot be compiled ({_reason(error)}). Set "
            "memory.compile=off."
        ) from error
    return tree_map_only(Tensor, _cut, result) if _cuts.get() else result


def _cut(result: Tensor) -> Tensor:
    """Detach from the graph; the next block still sees whether the result needs a gradient."""
    return result.detach().requires_grad_(result.requires_grad)


def _reason(error: Exception) -> str:
    """The first line of an error, or a C++ compiler's first error where there is one."""
    lines = str(getattr(error, "inner_exception", error)).strip().splitlines()
    return next((line.strip() for line in lines if "error: " in line), lines[0])


@cache
def _graphs(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """The compiled forward pass of all blocks of a class."""
    options: dict[str, Any] | None = None
    if backend == "inductor" and "deterministic" in torch._inductor.list_options():
        # No autotuning: a cache of reference predictions must hold for the next run too.
        options = {"deterministic": True}
    # A graph with dynamic shapes differs from the first shape's.
    return torch.compile(forward, backend=backend, fullgraph=True, dynamic=False, options=options)


# --- adapters ----------------------------------------------------------------------------------


def keep_start(policy: nn.Module) -> None:
    """Keep the weights of an adapter that does not start at zero: its reference has them."""
    policy._dpo_video_start = {  # type: ignore[assignment]
        name: weight.detach().clone()
        for name, weight in policy.named_parameters()
        if ".lora_" in name
    }


def kept_start(policy: nn.Module) -> Mapping[str, Tensor]:
    """What `keep_start` has kept; nothing for an adapter that starts at zero."""
    kept: Mapping[str, Tensor] = getattr(policy, "_dpo_video_start", {})
    return kept


def reset_adapter(policy: nn.Module) -> None:
    """Give the adapter its weights of the start, in new memory."""
    start = kept_start(policy)
    for name, weight in policy.named_parameters():
        if name in start:
            weight.data = start[name].to(weight.device, copy=True)
        elif not start and ".lora_B." in name:
            weight.data = torch.zeros_like(weight.data)


@contextmanager
def adapter_at_start(policy: nn.Module) -> Iterator[None]:
    """Inside, the adapter has its weights of the start, with the graphs of a trained one."""
    trained = [
        (weight, weight.data) for name, weight in policy.named_parameters() if ".lora_" in name
    ]
    try:
        reset_adapter(policy)
        yield
    finally:
        for weight, data in trained:
            weight.data = data
        torch.clear_autocast_cache()  # it holds casts of the weights of the start
