"""Frozen weights sharded over processes by FSDP2, `torch.distributed.fsdp.fully_shard`.

Every block is a group, and what lies between the blocks is another one. A group is gathered in one
collective before it is used, in the forward and again in the backward pass, and freed after it;
FSDP2 gathers the next one meanwhile. Parameters of an adapter are ignored: each process holds all
of them, so that adapter, optimizer and checkpoint are those of one process.

So are the numbers of a transformer, to the bit. Where blocks skip others, as in a UNet, FSDP2 sums
the gradients of a block's inputs in another order, and the last bits differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.utils._pytree import tree_map_only

from dpo_video.diffusion.experts import Experts
from dpo_video.errors import TrainingError
from dpo_video.memory.blocks import blocks


def shard_frozen_weights(
    networks: list[nn.Module], count: int, device: torch.device, *, on_host: bool = False
) -> None:
    """Shard the frozen weights of networks over the processes, in place.

    All processes must call it, and afterwards run the networks equally often. Deep copies must be
    made before. Wrappers of `forward` (checkpointing, chunks) stay as they are.

    Args:
        networks: On any device. Each is called as a whole, inside another module or not.
        count: Number of processes that share the weights, neighbours by rank. It divides the number
            of all processes.
        device: Where they run.
        on_host: Keep the parts of the blocks in CPU memory.

    Raises:
        TrainingError: if a network has no blocks, or two experts.
    """
    for network in networks:
        check_shardable(network)
    # Launchers number the processes of a node consecutively.
    shape = (dist.get_world_size() // count, count)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard"))["shard"]
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if on_host else OffloadPolicy()
    for network in networks:
        adapter = {each for each in network.parameters() if each.requires_grad}
        for parameter in adapter:
            parameter.data = parameter.data.to(device)
        for block in blocks(network):
            fully_shard(
                block,
                mesh=mesh,
                reshard_after_forward=True,
                ignored_params=adapter,
                offload_policy=offload,
            )
        network.register_forward_hook(_own_memory)
        # Sharded after each pass as well: what one process does between passes, such as saving a
        # checkpoint, then changes nothing for the others.
        named = type(network)
        fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=adapter)
        # FSDP2 has put a class of its own below the network's, whose name PEFT would save.
        type(network).__name__, type(network).__module__ = named.__name__, named.__module__


def _own_memory(network: nn.Module, inputs: object, outputs: Any) -> Any:
    """Copies of the outputs: on views, FSDP2's backward hooks would not be safe."""
    return tree_map_only(Tensor, Tensor.clone, outputs)


def check_shardable(network: nn.Module) -> None:
    """Check that a network's weights can be sharded; else a TrainingError."""
    if any(isinstance(module, Experts) for module in network.modules()):
        raise TrainingError(
            "memory.shard does not support a model of two experts: processes whose timesteps need "
            "different ones would wait for each other. Set memory.shard=1; memory.offload=blocks "
            "keeps the weights in CPU memory."
        )
    if next(blocks(network), None) is None:
        raise TrainingError(
            f"A {type(network).__name__} has no blocks whose weights could be sharded: no list of "
            "layers. Set memory.shard=1."
        )


@dataclass(frozen=True, kw_only=True)
class ShardedBytes:
    """Bytes of a network's frozen weights in one process."""

    whole: int
    """If they were not sharded."""
    parts: int
    """This process's parts."""
    parts_of_blocks: int
    """The part of `parts` that can be kept in CPU memory."""
    gathered: int
    """The most that is gathered at a time: what lies between the blocks, a block, and the next."""


def sharded_bytes(network: nn.Module, count: int) -> ShardedBytes:
    """Bytes of a network that is not sharded yet, as `shard_frozen_weights` would store it.

    Args:
        network: With or without an adapter, whose parameters are left out.
        count: Number of processes that share the weights.
    """
    frozen = {each for each in network.parameters() if not each.requires_grad}
    groups = [[p for p in block.parameters() if p in frozen] for block in blocks(network)]
    between = frozen.difference(*groups)
    largest = max((sum(p.nbytes for p in group) for group in groups), default=0)
    of_blocks = sum(_part(p, count) for group in groups for p in group)
    return ShardedBytes(
        whole=sum(p.nbytes for p in frozen),
        parts=of_blocks + sum(_part(p, count) for p in between),
        parts_of_blocks=of_blocks,
        # While a block runs, its weights are there, and the buffer into which the next one's are
        # gathered (in the forward pass, its own).
        gathered=sum(p.nbytes for p in between) + 2 * largest,
    )


def _part(parameter: Tensor, count: int) -> int:
    """Bytes of a process's rows; the last process's are padded."""
    rows = len(parameter)
    return math.ceil(rows / count) * (parameter.nbytes // rows)
