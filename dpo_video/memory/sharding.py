"""Frozen weights sharded over processes: each stores a part; a layer gathers its weight on use.

As ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054) and FSDP, for parameters without gradients:
nothing is reduced, and each layer gathers once per pass. Bytes are gathered as they are, packed
ones too, so that the numbers equal those of one process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self, final

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_video.support.memoryless import Memoryless

# all_gather_into_tensor is its name before torch 2.12.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@final
@dataclass(frozen=True, kw_only=True)
class Shard:
    """One process's part of a weight."""

    rank: int
    """Rank of this process in its group."""
    count: int
    """Number of processes in the group."""
    group: Any = None
    """Group of torch.distributed; None for all processes."""

    @classmethod
    def among(cls, count: int) -> Self:
        """This process's part among `count` processes of neighbouring ranks.

        `count` divides the number of all processes.
        """
        # Neighbouring ranks: launchers number the processes of a node consecutively.
        alone = count == dist.get_world_size()
        group = None if alone else dist.new_subgroups(group_size=count)[0]
        return cls(rank=dist.get_rank() % count, count=count, group=group)

    def take(self, tensor: Tensor) -> Tensor:
        """This process's bytes of a tensor: the same number in every process, the last padded."""
        data = tensor.contiguous().flatten().view(torch.uint8)
        size = math.ceil(len(data) / self.count)
        part = torch.zeros(size, dtype=torch.uint8, device=data.device)
        found = data[self.rank * size : (self.rank + 1) * size]
        part[: len(found)] = found
        return part

    def gather(self, part: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, from the bytes of all processes, which must call this in the same order."""
        if Memoryless.current is not None:
            return torch.empty(shape, dtype=dtype, device=part.device)
        data = torch.empty(len(part) * self.count, dtype=torch.uint8, device=part.device)
        _gather(data, part, group=self.group)
        return data[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
