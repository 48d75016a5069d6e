"""The frozen base in another form: its weights in fewer bits, on the host, or shared out.

Each matrix is put together when a layer needs it, in the forward and again in the backward pass,
and is gone after it. So no more than one is there in full, with checkpointing or without, and an
adapter trains on top as on any other base.

Weights in fewer bits change the numbers: the network is another one, for the policy and for a
toggled reference alike. `int8` and `fp8` are one scale a row (for a convolution: a filter) and
nothing but torch; `nf4` is QLoRA's (Dettmers et al. 2023, arXiv 2305.14314), 64 weights a scale, by
bitsandbytes' kernels. The quantizers of diffusers would do it while a checkpoint is loaded and for
linear layers alone: an AnimateDiff UNet is put together of two checkpoints, and half its weights
are convolutions. Its group offloading sets a parameter's data back to the host's after a forward
pass, where the backward pass, which needs it, looks for it; it is made for inference.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from dpo_video.diffusion.experts import Experts
from dpo_video.errors import TrainingError, UserError
from dpo_video.memory.blocks import blocks
from dpo_video.memory.offload import to_device, to_host
from dpo_video.memory.sharding import Shard

Base = Literal["native", "int8", "nf4", "fp8"]

_GROUP = 64  # weights of nf4 that share a scale: bitsandbytes' default, and QLoRA's
_FP8 = torch.float8_e4m3fn
_LARGEST = {"int8": 127.0, "fp8": torch.finfo(_FP8).max}
_INPUT_GRADIENTS: dict[type[Any], Any] = {
    nn.Conv1d: conv1d_input,
    nn.Conv2d: conv2d_input,
    nn.Conv3d: conv3d_input,
}


@final
@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight that is put together when it is needed. A copy of a network shares it."""

    parts: tuple[Tensor, ...]
    """What is stored."""
    base: Base
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    """Where it is needed."""
    on_host: bool
    shard: Shard | None = None
    """What of it this process stores, where it does not store all."""
    wholes: tuple[tuple[torch.Size, torch.dtype], ...] = ()
    """What the parts are where they are whole."""

    @classmethod
    def of(
        cls,
        weight: Tensor,
        base: Base,
        device: torch.device,
        on_host: bool,
        shard: Shard | None = None,
    ) -> Self:
        """Pack a weight; that is done on the device."""
        parts = _packed(weight.detach().to(device), base)
        wholes = tuple((part.shape, part.dtype) for part in parts)
        if shard is not None:
            parts = tuple(shard.of(part) for part in parts)
        return cls(
            parts=tuple(to_host(part) for part in parts) if on_host else parts,
            base=base,
            shape=weight.shape,
            dtype=weight.dtype,
            device=device,
            on_host=on_host,
            shard=shard,
            wholes=wholes,
        )

    def unpack(self) -> Tensor:
        """The weight, on the device."""
        parts = self.parts
        if self.on_host:
            parts = tuple(to_device(part, self.device) for part in parts)
        if self.shard is not None:
            parts = tuple(
                self.shard.whole(part, *shape)
                for part, shape in zip(parts, self.wholes, strict=True)
            )
        return _unpacked(parts, self.base, self.shape, self.dtype)

    def __deepcopy__(self, memo: Any) -> Self:
        return self


def check_base(base: Base) -> None:
    """A UserError if what packs the base is not installed."""
    if base == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "memory.quantization=nf4 needs bitsandbytes, which is not installed. Install it: "
            "pip install 'dpo-video[nf4]'. Or set memory.quantization=int8, which needs nothing."
        )


def pack_frozen_weights(
    network: nn.Module,
    device: torch.device,
    base: Base,
    *,
    on_host: bool = False,
    shard: Shard | None = None,
) -> int:
    """Store the frozen matrices of a network's blocks otherwise; how many there are.

    Those are the weights of its linear layers and convolutions, adapters left out. All else (norms,
    biases, what lies between the blocks) stays as it is, and where it is.

    Args:
        network: With an adapter or before it gets one.
        device: Where they are needed.
        base: "native" keeps their bits.
        on_host: Keep them in the host's memory.
        shard: Keep this part of each; other processes have the others.

    Raises:
        TrainingError: if there are none.
    """
    count = 0
    for block in blocks(network):
        for module in block.modules():
            forward = _forward_of(module)
            layer: Any = module
            if forward is None or layer.weight.requires_grad:
                continue
            layer.frozen = PackedWeight.of(layer.weight, base, device, on_host, shard)
            layer.forward = MethodType(forward, layer)
            # What asks it for its device and precision, as an adapter does, is answered.
            empty = torch.empty(0, dtype=layer.weight.dtype, device=device)
            layer._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
            count += 1
    for experts in network.modules():
        if isinstance(experts, Experts):
            experts.park = False  # there is not much left of them to be sent to and fro
    if not count:
        raise TrainingError(
            f"A {type(network).__name__} has no blocks with frozen matrices. Set "
            "memory.quantization=native and memory.shard=1, and take blocks out of memory.offload."
        )
    return count


def frozen_weights(network: nn.Module) -> Iterator[PackedWeight]:
    """All that a network has."""
    for module in network.modules():
        if isinstance(found := getattr(module, "frozen", None), PackedWeight):
            yield found


# --- layers --------------------------------------------------------------------------------------


def _forward_of(layer: nn.Module) -> Any:
    """What takes the place of its forward; None for what has no matrix, or pads it specially."""
    if isinstance(layer, nn.Linear):
        return _linear
    convolves = isinstance(layer, tuple(_INPUT_GRADIENTS))
    plain = getattr(layer, "padding_mode", "") == "zeros" and isinstance(layer.padding, tuple)
    return _convolution if convolves and plain else None


# Layers are called with `input=` by diffusers, too.
def _linear(layer: Any, input: Tensor) -> Tensor:
    result: Tensor = _Linear.apply(input, layer.bias, layer.frozen)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    """Keeps nothing for its backward pass, which needs the weight alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, frozen: PackedWeight) -> Tensor:
        ctx.frozen = frozen
        return F.linear(inputs, frozen.unpack(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.frozen.unpack().to(gradient.dtype), None, None


def _convolution(layer: Any, input: Tensor) -> Tensor:
    result: Tensor = _Convolution.apply(input, layer.bias, layer)  # type: ignore[no-untyped-call]
    return result


class _Convolution(torch.autograd.Function):
    """The same of a convolution; of its input it needs the shape."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        ctx.layer, ctx.shape = layer, inputs.shape
        convolved: Tensor = layer._conv_forward(inputs, layer.frozen.unpack(), bias)
        return convolved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        layer = ctx.layer
        kind = next(kind for kind in _INPUT_GRADIENTS if isinstance(layer, kind))
        weight = layer.frozen.unpack().to(gradient.dtype)
        of_inputs = _INPUT_GRADIENTS[kind](
            ctx.shape, weight, gradient, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        return of_inputs, None, None


# --- forms ---------------------------------------------------------------------------------------


def _packed(weight: Tensor, base: Base) -> tuple[Tensor, ...]:
    if base == "native":
        return (weight.clone(),)
    if base == "nf4":
        return _nf4(weight)
    rows = weight.float().flatten(1)
    scale = rows.abs().amax(dim=1, keepdim=True) / _LARGEST[base]
    levels = rows / torch.where(scale == 0, 1.0, scale)
    packed = levels.round().to(torch.int8) if base == "int8" else levels.to(_FP8)
    return packed, scale


def _unpacked(
    parts: tuple[Tensor, ...], base: Base, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    if base == "native":
        return parts[0]
    packed, scale = parts
    if base == "nf4":
        return _from_nf4(packed, scale, shape, dtype)
    # In the precision of the forward pass: a product in fp32 would be twice as much to hold.
    return (packed.to(dtype) * scale.to(dtype)).view(shape)


def _nf4(weight: Tensor) -> tuple[Tensor, ...]:
    if isinstance(weight, FakeTensor):  # its size is known without bitsandbytes
        groups = math.ceil(weight.numel() / _GROUP)
        packed = torch.empty(math.ceil(weight.numel() / 2), dtype=torch.uint8, device=weight.device)
        return packed, torch.empty(groups, device=weight.device)
    functional = importlib.import_module("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=_GROUP, quant_type="nf4"
    )
    return packed, state.absmax


def _from_nf4(packed: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if isinstance(packed, FakeTensor):
        return torch.empty(shape, dtype=dtype, device=packed.device)
    functional = importlib.import_module("bitsandbytes.functional")
    # As one row: on a CPU, bitsandbytes 0.50 mixes up the scales of rows shorter than a group.
    state = functional.QuantState(
        absmax=scale, shape=(shape.numel(),), dtype=dtype, blocksize=_GROUP, quant_type="nf4"
    )
    unpack: Tensor = functional.dequantize_4bit(packed, state)
    return unpack.view(shape)
