"""A network's blocks: what is computed again for the backward pass, how, and in how many parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_video.diffusion.experts import Experts
from dpo_video.errors import TrainingError
from dpo_video.memory.offload import kept_on_host


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The residual and transformer blocks, told by how a network is built.

    They are the members of its lists of layers. A member with several lists of its own is a stage
    of a UNet, and one with a longer list a stack: their blocks are inside. A member that is a
    single layer, as a UNet's downsampling is, has nothing worth computing again.
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
    """Its blocks, those that a forward pass goes through together: of several experts, one's."""
    experts = [module for module in network.modules() if isinstance(module, Experts)]
    parts = [part for each in experts for part in (each.transformer, each.transformer_2)]
    return [list(blocks(part)) for part in parts or [network]]


def _has_layers(member: nn.Module) -> bool:
    """Whether it is made of more than one layer with weights."""
    layers = (m for m in member.modules() if next(m.parameters(recurse=False), None) is not None)
    return len(list(islice(layers, 2))) > 1


# --- checkpointing -----------------------------------------------------------------------------


def checkpoint_blocks(
    network: nn.Module, count: int | None = None, *, inputs_on_host: bool = False
) -> int:
    """Let blocks compute their activations again for their backward; how many do.

    Without a graph, nothing changes. A deep copy of the network is checkpointed as well. Called
    again, it replaces what it did before.

    Args:
        network: Any with lists of layers.
        count: How many blocks of a forward pass, from both ends of the network inwards: in a UNet
            the outer ones hold the most. All if left out, and if there are no more.
        inputs_on_host: Keep what they were given in the host's memory until then.

    Raises:
        TrainingError: if the network has no blocks.
    """
    together: list[list[Any]] = passes(network)
    found = [block for part in together for block in part]
    if not found:
        raise TrainingError(
            f"A {type(network).__name__} has no blocks that could be checkpointed: no list of "
            "layers. Set memory.checkpointing=none."
        )
    chosen = [block for part in together for block in from_outside_in(part)[:count]]
    for block in found:
        if hasattr(block, "_computed"):
            block.forward = block._computed
            del block._computed
    for block in chosen:
        block._computed, block.forward = block.forward, MethodType(_recomputed, block)
        block._inputs_on_host = inputs_on_host
    return len(chosen)


def from_outside_in(found: list[Any]) -> list[Any]:
    """The first, the last, the second, the last but one, and so on."""
    ends = zip(found, reversed(found), strict=True)
    return [block for pair in ends for block in pair][: len(found)]


def _recomputed(block: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return block._computed(*args, **kwargs)
    with kept_on_host((args, kwargs)) if block._inputs_on_host else nullcontext():
        return _again(block._computed, *args, **kwargs)


def _again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    # All by position: only so does torch show what it keeps to `kept_on_host`.
    # Backbones load in evaluation mode and the adapter has no dropout: nothing is drawn inside.
    return checkpoint(
        _called, forward, tuple(kwargs), *args, *kwargs.values(),
        use_reentrant=False, preserve_rng_state=False,
    )  # fmt: skip


def _called(forward: Any, names: tuple[str, ...], *values: Any) -> Any:
    count = len(values) - len(names)
    return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))


# --- attention ---------------------------------------------------------------------------------


def attend_by_kernel(network: nn.Module) -> int:
    """Have every attention computed by scaled_dot_product_attention; how many were not.

    A processor that multiplies queries and keys itself holds a matrix of all tokens by all tokens:
    2 GiB a head for Wan's 32,760 in bf16. diffusers' own choice is never one, a plugin's may be.

    Args:
        network: With diffusers' attention layers. Called again, nothing happens.
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
    """Run what works token by token in parts, each again for its backward; how many such layers.

    Those are the feed-forward layers, whose hidden activations are four times as wide as all others
    or more, and the cross-attentions, where no query needs another. What is alive of their inside
    is one part's. Exact to the rounding of a matrix product with fewer rows.

    Args:
        network: Of diffusers' layers.
        chunks: Parts of each. Called again, it replaces what was set before; 1 takes it back.

    Raises:
        TrainingError: if the network has no such layers.
    """
    from diffusers.models.attention import FeedForward

    found = 0
    module: Any
    for module in network.modules():
        if isinstance(module, FeedForward) or getattr(module, "is_cross_attention", False):
            found += 1
            if chunks > 1:
                run = _rows_in_chunks if isinstance(module, FeedForward) else _queries_in_chunks
                module._chunks, module.forward = chunks, MethodType(run, module)
            elif "forward" in vars(module):
                del module.forward
    if not found:
        raise TrainingError(
            f"A {type(network).__name__} has no feed-forward layers that could run in parts. Set "
            "memory.forward_chunks=1."
        )
    return found


def _rows_in_chunks(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    parts = [_part(layer, part, *args, **kwargs) for part in rows.chunk(layer._chunks)]
    return torch.cat(parts).view(*hidden_states.shape[:-1], -1)


def _queries_in_chunks(
    layer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    given = (encoder_hidden_states, *args)
    if encoder_hidden_states is None:  # it is used as a self-attention
        attended: Tensor = type(layer).forward(layer, hidden_states, *given, **kwargs)
        return attended
    parts = hidden_states.chunk(layer._chunks, dim=1)
    return torch.cat([_part(layer, part, *given, **kwargs) for part in parts], dim=1)


def _part(layer: Any, part: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    run = _again if torch.is_grad_enabled() else _called_now
    result: Tensor = run(partial(type(layer).forward, layer), part, *args, **kwargs)
    return result


def _called_now(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)
