"""Frozen weights in another form: in fewer bits, or in CPU memory.

A layer's weight is unpacked when the layer needs it, in the forward and again in the backward pass,
and freed after it. So at most one is on the device in full, with checkpointing or without, and an
adapter trains on top of them as on any others.

Weights in fewer bits change the numbers: the network is another one, for the policy and a toggled
reference alike. `int8` stores one scale per row (for a convolution: per filter) and needs
nothing but torch; `nf4` is QLoRA's (Dettmers et al. 2023, arXiv 2305.14314), 64 weights per scale,
by bitsandbytes' kernels. The quantizers of diffusers work while a checkpoint is loaded and on
linear layers only: an AnimateDiff UNet is assembled from two checkpoints, and half of its weights
are convolutions. diffusers' group offloading moves a weight back to CPU memory after the forward
pass, so that the backward pass does not find it: it is made for inference.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from dpo_video.diffusion.experts import Experts
from dpo_video.errors import TrainingError, UserError
from dpo_video.memory.blocks import blocks
from dpo_video.memory.hooks import wrap_forward
from dpo_video.memory.offload import to_device, to_host
from dpo_video.support.memoryless import Memoryless

Base = Literal["native", "int8", "nf4"]

_GROUP = 64  # weights of nf4 that share a scale: bitsandbytes' default, and QLoRA's
# A convolution, and its gradient with respect to the input.
_CONVOLUTIONS: dict[type[Any], tuple[Any, Any]] = {
    nn.Conv1d: (F.conv1d, conv1d_input),
    nn.Conv2d: (F.conv2d, conv2d_input),
    nn.Conv3d: (F.conv3d, conv3d_input),
}


@final
@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight that is unpacked on use. Deep copies of a network share it."""

    parts: tuple[Tensor, ...]
    """The stored tensors: the weight, or its bits and scales."""
    base: Base
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    """Where it is unpacked."""
    on_host: bool

    @classmethod
    def pack(cls, weight: Tensor, base: Base, device: torch.device, on_host: bool) -> Self:
        """Pack a weight, on the device."""
        parts = _packed(weight.detach().to(device), base)
        return cls(
            parts=tuple(to_host(part) for part in parts) if on_host else parts,
            base=base,
            shape=weight.shape,
            dtype=weight.dtype,
            device=device,
            on_host=on_host,
        )

    def unpack(self) -> Tensor:
        """The weight, on the device."""
        parts = self.parts
        if self.on_host:
            parts = tuple(to_device(part, self.device) for part in parts)
        return _unpacked(parts, self.base, self.shape, self.dtype)

    def __deepcopy__(self, memo: Any) -> Self:
        return self


def check_base(base: Base) -> None:
    """Check that the package which a format needs is installed; else a UserError."""
    if base == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "memory.quantization=nf4 needs bitsandbytes, which is not installed. Install it: "
            "pip install 'dpo-video[nf4]'. Or set memory.quantization=int8, which needs no package."
        )


def pack_frozen_weights(
    network: nn.Module, device: torch.device, base: Base, *, on_host: bool = False
) -> int:
    """Pack the frozen matrices of a network's blocks; return how many.

    These are the weights of its linear layers and convolutions, adapters excluded. Everything else
    (norms, biases, layers between the blocks) stays as it is and where it is.

    Args:
        network: With or without an adapter.
        device: Where weights are unpacked.
        base: Format; "native" keeps their bits.
        on_host: Keep them in CPU memory.

    Raises:
        TrainingError: if there are none.
    """
    count = 0
    for block in blocks(network):
        for module in block.modules():
            layer: Any = module
            wrapper = _wrapper_of(layer)
            if wrapper is None or layer.weight.requires_grad:
                continue
            layer.packed_weight = PackedWeight.pack(layer.weight, base, device, on_host)
            wrap_forward(layer, "unpack", wrapper)
            # An adapter asks its layer's weight for device and dtype.
            empty = torch.empty(0, dtype=layer.weight.dtype, device=device)
            layer.weight = nn.Parameter(empty, requires_grad=False)
            count += 1
    for experts in network.modules():
        if isinstance(experts, Experts):
            experts.park = False  # too little of them is left to move
    if not count:
        raise TrainingError(
            f"A {type(network).__name__} has no blocks with frozen matrices. Set "
            "memory.quantization=native, and take blocks out of memory.offload."
        )
    return count


def frozen_weights(network: nn.Module) -> Iterator[PackedWeight]:
    """The packed weights of a network."""
    for module in network.modules():
        if isinstance(found := getattr(module, "packed_weight", None), PackedWeight):
            yield found


# --- layers --------------------------------------------------------------------------------------


def _wrapper_of(layer: nn.Module) -> Any:
    """The wrapper for a plain linear layer or convolution; None for all other layers."""
    if type(layer).forward is nn.Linear.forward:
        return _linear
    plain = getattr(layer, "padding_mode", "") == "zeros" and isinstance(layer.padding, tuple)
    return _convolution if plain and _kind_of(layer) else None


def _kind_of(layer: nn.Module) -> Any:
    return next((kind for kind in _CONVOLUTIONS if type(layer).forward is kind.forward), None)


# diffusers calls layers with `input=`, too.
def _linear(forward: Any, layer: Any, /, input: Tensor) -> Tensor:
    result: Tensor = _Linear.apply(input, layer.bias, layer.packed_weight)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    """Saves nothing for the backward pass, which needs the weight alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, packed: PackedWeight) -> Tensor:
        ctx.packed = packed
        return F.linear(inputs, packed.unpack(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.packed.unpack().to(gradient.dtype), None, None


def _convolution(forward: Any, layer: Any, /, input: Tensor) -> Tensor:
    result: Tensor = _Convolution.apply(input, layer.bias, layer)  # type: ignore[no-untyped-call]
    return result


class _Convolution(torch.autograd.Function):
    """As `_Linear`; the backward pass also needs the shape of the input."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        ctx.layer, ctx.shape = layer, inputs.shape
        convolve, _ = _CONVOLUTIONS[_kind_of(layer)]
        convolved: Tensor = convolve(
            inputs, layer.packed_weight.unpack(), bias,
            layer.stride, layer.padding, layer.dilation, layer.groups,
        )  # fmt: skip
        return convolved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        layer = ctx.layer
        _, input_gradient = _CONVOLUTIONS[_kind_of(layer)]
        weight = layer.packed_weight.unpack().to(gradient.dtype)
        of_inputs = input_gradient(
            ctx.shape, weight, gradient, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        return of_inputs, None, None


# --- formats ----------------------------------------------------------------------------------


def _packed(weight: Tensor, base: Base) -> tuple[Tensor, ...]:
    if base == "native":
        return (weight.clone(),)
    if base == "nf4":
        return _nf4(weight)
    rows = weight.float().flatten(1)
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    scaled = rows / torch.where(scale == 0, 1.0, scale)
    return scaled.round().to(torch.int8), scale


def _unpacked(
    parts: tuple[Tensor, ...], base: Base, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    if base == "native":
        return parts[0]
    packed, scale = parts
    if base == "nf4":
        return _from_nf4(packed, scale, shape, dtype)
    # In the precision of the forward pass: a product in fp32 takes twice the memory.
    return (packed.to(dtype) * scale.to(dtype)).view(shape)


def _nf4(weight: Tensor) -> tuple[Tensor, ...]:
    if Memoryless.current is not None:  # of the right size without bitsandbytes
        groups = math.ceil(weight.numel() / _GROUP)
        packed = torch.empty(math.ceil(weight.numel() / 2), dtype=torch.uint8, device=weight.device)
        return packed, torch.empty(groups, device=weight.device)
    functional = importlib.import_module("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=_GROUP, quant_type="nf4"
    )
    return packed, state.absmax


def _from_nf4(packed: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if Memoryless.current is not None:
        return torch.empty(shape, dtype=dtype, device=packed.device)
    functional = importlib.import_module("bitsandbytes.functional")
    # As one row: on a CPU, bitsandbytes 0.50 mixes up the scales of rows shorter than a group.
    state = functional.QuantState(
        absmax=scale, shape=(shape.numel(),), dtype=dtype, blocksize=_GROUP, quant_type="nf4"
    )
    unpack: Tensor = functional.dequantize_4bit(packed, state)
    return unpack.view(shape)
