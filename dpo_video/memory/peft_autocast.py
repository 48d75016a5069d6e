"""Under mixed precision, an adapter keeps no copy of its own of what its layer is given.

peft casts the input of an adapted layer to its adapter's fp32, and autocast casts that back to half
precision. The second copy waits for the backward pass; three of them where the same tokens make
queries, keys and values. Autocast alone gives the same numbers from the input itself, to the bit.
"""

from __future__ import annotations

from types import MethodType

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def skip_adapter_input_cast(policy: nn.Module) -> None:
    """Leave the precision of adapters' inputs to autocast; without it, all stays as peft has it."""
    for module in policy.modules():
        if isinstance(module, BaseTunerLayer):
            module._cast_input_dtype = MethodType(_cast_input, module)


def _cast_input(layer: BaseTunerLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the place of the layer's own method."""
    if torch.is_autocast_enabled(x.device.type):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)
