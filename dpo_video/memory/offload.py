"""Offloading to CPU memory while a GPU trains: block inputs, and AdamW's state.

Gradients stay the same. Copies run on the GPU's current stream and do not overlap its work: they
take time, at some 10 to 25 GB/s each way (55 on an H200, where AnimateDiff's steps take 5% longer
with offloaded block inputs and Wan's no longer). For frozen weights see
dpo_video/memory/packed_weights.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._pytree import tree_leaves

from dpo_video.memory.peak import on_host

HOST = torch.device("cpu")


def to_host(tensor: Tensor) -> Tensor:
    """A copy in CPU memory, with the tensor's strides; pinned if the tensor is on a GPU."""
    with on_host():
        copy = torch.empty_like(tensor, device=HOST, pin_memory=tensor.is_cuda)
    # Safe without blocking: only later work of the same stream reuses the tensor's memory.
    return copy.copy_(tensor, non_blocking=True)


# --- checkpoints -------------------------------------------------------------------------------


@contextmanager
def kept_on_host(given: Any) -> Iterator[None]:
    """Inside, tensors saved for the backward pass that need a gradient are kept in CPU memory.

    Tensors without gradient are shared by many blocks (an encoded prompt, rotary embeddings) and
    stay on the device.

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
    """A copy on the device of a tensor in CPU memory."""
    return torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)


# --- the optimizer -----------------------------------------------------------------------------


@final
class HostAdamW(torch.optim.AdamW):
    """AdamW with its momenta in CPU memory, where it also computes the update.

    Its state has AdamW's layout, so that either can resume from the other's. In each step the
    adapter's weights and gradients are copied to CPU memory, and the weights back.
    """

    on_host = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of AdamW (Loshchilov and Hutter 2019)."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            used = [parameter for parameter in group["params"] if parameter.grad is not None]
            values = [parameter.detach().to(HOST) for parameter in used]
            states = [self._state_of(parameter) for parameter in used]
            adamw(
                values,
                [parameter.grad.to(HOST) for parameter in used],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for parameter, value in zip(used, values, strict=True):
                parameter.copy_(value)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of AdamW."""
        super().load_state_dict(state_dict)  # moves it to the device of the parameters
        for state in self.state.values():
            for name, value in state.items():
                state[name] = value.to(HOST)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, device=HOST)
        return state
