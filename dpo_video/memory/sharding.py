"""Frozen weights that several processes hold together: each a part, whole where a layer needs it.

What ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054) and FSDP do to parameters, for parameters
that have no gradient: nothing is to be reduced, and one gathering a layer and pass is all. Bytes
are gathered as they are, packed ones too, so that the numbers are those of one process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Its name until torch 2.12.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@final
@dataclass(frozen=True, kw_only=True)
class Shard:
    """One process's part of what a group of them holds."""

    rank: int
    """Of this process in its group."""
    count: int
    """Processes in the group."""
    group: Any = None
    """torch.distributed's; None for all processes."""

    @classmethod
    def among(cls, count: int) -> Self:
        """This process's part where so many neighbours hold something together.

        Their number divides that of all processes.
        """
        # Neighbours by rank: launchers number the processes of a node one after another.
        alone = count == dist.get_world_size()
        group = None if alone else dist.new_subgroups(group_size=count)[0]
        return cls(rank=dist.get_rank() % count, count=count, group=group)

    def of(self, tensor: Tensor) -> Tensor:
        """This process's bytes of a tensor; as many in every process, the last padded."""
        data = tensor.contiguous().flatten().view(torch.uint8)
        size = math.ceil(len(data) / self.count)
        mine = torch.zeros(size, dtype=torch.uint8, device=data.device)
        found = data[self.rank * size : (self.rank + 1) * size]
        mine[: len(found)] = found
        return mine

    def whole(self, mine: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, of all the processes' bytes. They must all call this, in one order."""
        if isinstance(mine, FakeTensor):
            return torch.empty(shape, dtype=dtype, device=mine.device)
        data = torch.empty(len(mine) * self.count, dtype=torch.uint8, device=mine.device)
        _gather(data, mine, group=self.group)
        return data[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
