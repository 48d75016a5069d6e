"""Blocks of a network: activation checkpointing, attention kernels, and layers run in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_video.diffusion.experts import Experts
from dpo_video.errors import TrainingError
from dpo_video.memory.hooks import wrap_forward
from dpo_video.memory.offload import kept_on_host


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The residual and transformer blocks of a network, found by its structure.

    Blocks are the members of lists of layers (`nn.ModuleList`). A member with several such lists is
    a stage of a UNet, and one with a longer list a stack: their blocks are inside. A member that is
    a single layer, such as a UNet's downsampling, is no block: recomputing it saves nothing.
    """
    for child in network.children():
        if not isinstance(child, nn.ModuleList):
            yield from blocks(child)
            continue
        for member in child:
            lists = [inner for inner in member.children() if isinstance(inner, nn.ModuleList)]
            if len(lists) > 1 or any(len(inner) > 1 for inner in lists):
                yield from blocks(member)
            elif _has_layers(member):
                yield member


def passes(network: nn.Module) -> list[list[nn.Module]]:
    """The blocks of each forward pass: of several experts, only one runs at a time."""
    experts = [module for module in network.modules() if isinstance(module, Experts)]
    parts = [part for each in experts for part in (each.transformer, each.transformer_2)]
    return [list(blocks(part)) for part in parts or [network]]


def _has_layers(member: nn.Module) -> bool:
    """Whether a member has more than one layer with weights."""
    layers = (m for m in member.modules() if next(m.parameters(recurse=False), None) is not None)
    return len(list(islice(layers, 2))) > 1


# --- checkpointing -----------------------------------------------------------------------------


def checkpoint_blocks(
    network: nn.Module, count: int | None = None, *, inputs_on_host: bool = False
) -> int:
    """Recompute the activations of blocks in the backward pass; return how many blocks do.

    Without gradients nothing changes. Another call replaces the effect of an earlier one.

    Args:
        network: Any network with lists of layers.
        count: Blocks of each forward pass, from both ends of the network inwards: in a UNet the
            outer ones have the largest activations. All blocks if None or too large.
        inputs_on_host: Keep the inputs of these blocks in CPU memory until the backward pass.

    Raises:
        TrainingError: if the network has no blocks.
    """
    parts = passes(network)
    if not any(parts):
        raise TrainingError(
            f"A {type(network).__name__} has no blocks that could be checkpointed: no list of "
            "layers. Set memory.checkpointing=none."
        )
    chosen = [block for part in parts for block in from_outside_in(part)[:count]]
    for part in parts:
        for block in part:
            wrap_forward(block, "checkpoint", None)
    for block in chosen:
        wrap_forward(block, "checkpoint", partial(_recomputed, inputs_on_host))
    return len(chosen)


def from_outside_in(found: list[Any]) -> list[Any]:
    """In the order first, last, second, last but one, and so on."""
    ends = zip(found, reversed(found), strict=True)
    return [block for pair in ends for block in pair][: len(found)]


def _recomputed(
    inputs_on_host: bool, forward: Any, block: nn.Module, /, *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return _run(partial(forward, block), block, args, kwargs)
    with kept_on_host((args, kwargs)) if inputs_on_host else nullcontext():
        return _checkpoint(partial(forward, block), *args, **kwargs)


_instead: list[Callable[..., Any]] = []  # a list, because compiled blocks read it


@contextmanager
def checkpointed_by(run: Callable[..., Any]) -> Iterator[None]:
    """Inside, `run(part, module, args, kwargs)` runs each checkpointed part of a network.

    `part(*args, **kwargs)` is what would run without it.
    """
    _instead.append(run)
    try:
        yield
    finally:
        _instead.pop()


def _run(part: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run a part, or what stands in for it; `module` is the last argument bound to it."""
    if _instead:
        return _instead[-1](part, module, args, kwargs)
    return part(*args, **kwargs)


def _checkpoint(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(partial(_recompute, forward), forward.args[-1], args, kwargs)


def _recompute(forward: Any, *args: Any, **kwargs: Any) -> Any:
    # Positional arguments only: torch passes no others to the hooks of `kept_on_host`.
    # Backbones load in evaluation mode and the adapter has no dropout: no random numbers to replay.
    return checkpoint(
        _by_position, forward, tuple(kwargs), *args, *kwargs.values(),
        use_reentrant=False, preserve_rng_state=False,
    )  # fmt: skip


def _by_position(forward: Any, names: tuple[str, ...], *values: Any) -> Any:
    count = len(values) - len(names)
    return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))


# --- attention ---------------------------------------------------------------------------------


def attend_by_kernel(network: nn.Module) -> int:
    """Compute every attention with scaled_dot_product_attention; return how many did otherwise.

    A processor that multiplies queries and keys itself stores a matrix of tokens by tokens: 2 GiB a
    head for Wan's 32,760 in bf16. diffusers never chooses one by default; a plugin may.

    Args:
        network: With diffusers' attention layers. Another call changes nothing.
    """
    from diffusers.models import attention_processor as processors

    kernels = {
        processors.AttnProcessor: processors.AttnProcessor2_0,
        processors.SlicedAttnProcessor: processors.AttnProcessor2_0,
        processors.AttnAddedKVProcessor: processors.AttnAddedKVProcessor2_0,
        processors.SlicedAttnAddedKVProcessor: processors.AttnAddedKVProcessor2_0,
    }
    replaced = 0
    module: Any
    for module in network.modules():
        kernel = kernels.get(type(getattr(module, "processor", None)))
        if kernel is not None:
            module.set_processor(kernel())
            replaced += 1
    return replaced


# --- chunks ------------------------------------------------------------------------------------


def run_in_chunks(network: nn.Module, chunks: int) -> int:
    """Run layers that treat tokens independently in chunks of tokens; return how many layers.

    These are the feed-forward layers, whose hidden activations are four times as wide as all others
    or more, and the cross-attentions, where no query needs another. Each chunk is checkpointed, so
    that only one chunk's inner activations exist at a time. Exact up to the rounding of a matrix
    product with fewer rows.

    Args:
        network: Of diffusers' layers.
        chunks: Number of chunks of each layer; 1 undoes it. Another call replaces an earlier one.

    Raises:
        TrainingError: if the network has no such layers.
    """
    from diffusers.models.attention import FeedForward

    found = 0
    for module in network.modules():
        if isinstance(module, FeedForward):
            run: Any = _rows_in_chunks
        elif getattr(module, "is_cross_attention", False):
            run = _queries_in_chunks
        else:
            continue
        found += 1
        wrap_forward(module, "chunk", partial(run, chunks) if chunks > 1 else None)
    if not found:
        raise TrainingError(
            f"A {type(network).__name__} has no feed-forward layers that could run in chunks. Set "
            "memory.forward_chunks=1."
        )
    return found


def _rows_in_chunks(
    chunks: int,
    forward: Any,
    layer: nn.Module,
    /,
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    run = partial(forward, layer)
    parts = [_chunk(run, part, *args, **kwargs) for part in rows.chunk(chunks)]
    return torch.cat(parts).view(*hidden_states.shape[:-1], -1)


def _queries_in_chunks(
    chunks: int,
    forward: Any,
    layer: nn.Module,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    run = partial(forward, layer)
    if encoder_hidden_states is None:  # used as a self-attention
        attended: Tensor = run(hidden_states, None, *args, **kwargs)
        return attended
    parts = hidden_states.chunk(chunks, dim=1)
    return torch.cat(
        [_chunk(run, part, encoder_hidden_states, *args, **kwargs) for part in parts], dim=1
    )


def _chunk(run: Any, part: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if torch.is_grad_enabled():
        checkpointed: Tensor = _checkpoint(run, part, *args, **kwargs)
        return checkpointed
    result: Tensor = _run(run, run.args[-1], (part, *args), kwargs)
    return result
