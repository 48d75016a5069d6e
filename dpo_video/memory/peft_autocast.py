"""Under autocast, an adapter keeps no fp32 copy of its layer's input.

peft casts the input of an adapted layer to the adapter's fp32, and autocast casts that back to half
precision. The fp32 copy is kept for the backward pass; three of them where the same tokens make
queries, keys and values. Autocast alone gives the same bits from the input itself.
"""

from __future__ import annotations

from types import MethodType

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def skip_adapter_input_cast(policy: nn.Module) -> None:
    """Leave the cast of adapters' inputs to autocast; without autocast, peft casts as before."""
    for module in policy.modules():
        if isinstance(module, BaseTunerLayer):
            module._cast_input_dtype = MethodType(_cast_input, module)


def _cast_input(layer: BaseTunerLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Replaces the method of peft's layer: peft has a switch, but none that depends on autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)
