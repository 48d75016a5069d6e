"""A network's blocks by torch.compile: fewer, larger kernels in the place of many small ones.

Every block is one graph, without a break; blocks that are alike share theirs. What a graph cannot
hold is refused, and so is a block of more shapes than there is room for: torch would otherwise run
it as it is and say nothing. What is checkpointed is the compiled block, so that the same graph runs
again for the backward pass.

A compiler fuses a graph with a backward pass otherwise than one without, and one with an adapter
otherwise than one without: their last bits differ, and beta multiplies what policy and reference
differ by. (Of a small Wan in bf16, the margin of an untrained policy was 3e-3 then: 8 logits.) So
both run the very same graphs. The reference is given an adapter that adds zeros, and what needs no
graph of autograd's runs with one, which every block cuts off behind itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dpo_video.errors import TrainingError, UserError
from dpo_video.memory.blocks import blocks
from dpo_video.settings import MemorySettings

BACKEND = "inductor"
GRAPHS = 256  # of one class of blocks: as many as it has shapes, some of them twice

_cuts: ContextVar[bool] = ContextVar("_cuts", default=False)


def check_compile(memory: MemorySettings, device: torch.device) -> None:
    """A UserError if it is asked for, and does not go with the other modes or the device."""
    if memory.compile == "off":
        return
    if memory.quantization != "native" or memory.shard > 1 or "blocks" in memory.offload:
        # Of int8, a compiled block was seen to keep what it had unpacked.
        raise UserError(
            "memory.compile=on would keep whole weights for the backward pass, where "
            "memory.quantization, "
            "memory.offload=blocks and memory.shard hold a layer's at a time. Set "
            "memory.compile=off, or leave those out."
        )
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
    """Let blocks run compiled wherever there are gradients; how many do.

    Under torch.no_grad they run as they are: samples have other shapes than a step, which are not
    worth a graph. A deep copy of the network is compiled as well. Raises torch's limit of graphs,
    which is the whole process's. Called again, it replaces what it did before.

    Args:
        network: Any with lists of layers, checkpointed or not.
        on: Or as they are.

    Raises:
        TrainingError: if the network has no blocks.
    """
    found: list[Any] = list(blocks(network))
    if not found:
        raise TrainingError(
            f"A {type(network).__name__} has no blocks that could be compiled: no list of layers. "
            "Set memory.compile=off."
        )
    for block in found:
        # A checkpointed block is compiled below its checkpoint.
        name = "_computed" if hasattr(block, "_computed") else "forward"
        if hasattr(block, "_plain"):
            setattr(block, name, block._plain)
            del block._plain
        if on:
            block._plain = getattr(block, name)
            setattr(block, name, MethodType(_run, block))
    if not on:
        return 0
    limits: Any = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, GRAPHS)
    limits.fail_on_cache_limit_hit = True
    return len(found)


def is_compiled(network: nn.Module) -> bool:
    """Whether any of its blocks is."""
    return any("_plain" in vars(module) for module in network.modules())


@contextmanager
def without_graph(network: nn.Module) -> Iterator[None]:
    """Inside, nothing is kept for a backward pass: of a compiled network, no more than a block's.

    What comes out of a compiled one is to be detached.
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


def _run(block: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return block._plain(*args, **kwargs)
    try:
        result = _graphs(block._plain.__func__, BACKEND)(block, *args, **kwargs)
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
    """Without what it came from; the next block still sees whether that had a gradient."""
    return result.detach().requires_grad_(result.requires_grad)


def _reason(error: Exception) -> str:
    """The line that says it: a compiler's first complaint where there is one."""
    lines = str(getattr(error, "inner_exception", error)).strip().splitlines()
    return next((line.strip() for line in lines if "error: " in line), lines[0])


@cache
def _graphs(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """The compiled forward pass of all blocks of a class."""
    options: dict[str, Any] | None = None
    if backend == "inductor" and "deterministic" in torch._inductor.list_options():
        # Kernels by rule and not by a race: a bank of predictions must be the next run's, too.
        options = {"deterministic": True}
    # A graph for any shape is another one than the first shape's.
    return torch.compile(forward, backend=backend, fullgraph=True, dynamic=False, options=options)


# --- adapters ----------------------------------------------------------------------------------


def last_weights(policy: nn.Module) -> list[nn.Parameter]:
    """The second matrix of every LoRA: where it is zero, the adapter adds nothing."""
    return [weight for name, weight in policy.named_parameters() if ".lora_B." in name]


@contextmanager
def zeroed_adapter(policy: nn.Module) -> Iterator[None]:
    """Inside, an adapter adds zeros, by the graphs of one that does not."""
    weights = last_weights(policy)
    trained = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = torch.zeros_like(weight.data)
        yield
    finally:
        for weight, data in zip(weights, trained, strict=True):
            weight.data = data
        torch.clear_autocast_cache()  # of the zeros
