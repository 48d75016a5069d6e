"""The updates of a network's adapter, and a network's precision."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from dpo_video.types import LoraDelta, LoraUpdate


def read_delta(network: nn.Module) -> LoraDelta:
    """The updates of a network's adapter, on the CPU."""
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.lora_A.keys()
            found[name] = LoraUpdate(
                down=layer.lora_A[adapter].weight.detach().cpu(),
                up=layer.lora_B[adapter].weight.detach().cpu(),
                scale=float(layer.scaling[adapter]),
            )
    return found


def precision(network: nn.Module) -> torch.dtype:
    """The precision that a network was loaded in: its coarsest, since some parts stay in fp32."""
    kinds = {p.dtype for p in network.parameters() if p.is_floating_point()}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)
