"""What waits in the host's memory while a GPU trains: block inputs, block weights, AdamW's state.

Every mode here gives the gradients that it would give without. Copies go over the GPU's own stream
and are not hidden behind its work: they take time, at some 10 to 25 GB/s each way. On machines
without a GPU all runs, and is tested, with both memories the same; on a GPU nothing here has been
run yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dpo_video.peak import on_host

HOST = torch.device("cpu")


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, as the tensor lies; pinned for a GPU."""
    with on_host():
        copy = torch.empty_like(tensor, device=HOST, pin_memory=tensor.is_cuda)
    # The tensor's memory is used again by work of the same stream only, which waits for the copy.
    return copy.copy_(tensor, non_blocking=True)


# --- checkpoints -------------------------------------------------------------------------------


@contextmanager
def kept_on_host(given: Any) -> Iterator[None]:
    """Inside, those tensors that need a gradient wait for their backward in the host's memory.

    The others are shared by many blocks (an encoded prompt, rotary embeddings) and stay.

    Args:
        given: A block's arguments.
    """
    moving = {
        id(tensor.untyped_storage())
        for tensor in tree_leaves(given)
        if isinstance(tensor, Tensor) and tensor.requires_grad
    }

    def pack(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
        if id(tensor.untyped_storage()) not in moving:
            return None, tensor
        return tensor.device, to_host(tensor)

    def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor if device is None else to_device(tensor, device)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of what waits in the host's memory."""
    return torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)
