"""Two denoisers for high and low timesteps as one network (Wan 2.2's A14B)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from dpo_video.errors import UserError
from dpo_video.support.memoryless import Memoryless


@final
class Experts(nn.Module):
    """A high-noise and a low-noise denoiser; the timestep of a video selects one of them.

    They have the names of the checkpoint, so that an adapter's keys begin with the expert's name.
    """

    def __init__(
        self, transformer: nn.Module, transformer_2: nn.Module, *, boundary: float, park: bool
    ) -> None:
        """Combine two experts.

        Args:
            transformer: For timesteps from `boundary` up.
            transformer_2: For timesteps below `boundary`.
            boundary: A timestep.
            park: Keep the idle expert in CPU memory. Adapters stay on the device, since an
                optimizer refers to them.
        """
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2
        self.boundary, self.park = boundary, park

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any
    ) -> tuple[Tensor]:
        """As either expert. Timesteps are one per video, or one per token and equal in a video."""
        inputs = (hidden_states, timestep, encoder_hidden_states)
        if Memoryless.current is not None:  # without a value; both experts cost the same
            return (_prediction(self.transformer, *inputs, **options),)
        high = timestep.reshape(len(timestep), -1)[:, 0] >= self.boundary
        if high.all():
            return (self._run(self.transformer, *inputs, **options),)
        if not high.any():
            return (self._run(self.transformer_2, *inputs, **options),)
        if self.park and torch.is_grad_enabled() and hidden_states.device.type != "cpu":
            raise UserError(
                "A batch needs both experts at once, and one of them is kept in CPU memory. "
                "Set train.batch_size=1 (and raise train.gradient_accumulation_steps), or "
                "backbone.idle_expert=device."
            )
        parts = [
            self._run(expert, *(value[rows] for value in inputs), **options)
            for expert, rows in ((self.transformer, high), (self.transformer_2, ~high))
        ]
        order = torch.cat([high.nonzero(), (~high).nonzero()]).squeeze(1).argsort()
        return (torch.cat(parts)[order],)

    def _run(
        self, expert: nn.Module, hidden_states: Tensor, *inputs: Tensor, **options: Any
    ) -> Tensor:
        if self.park and next(expert.parameters()).device != hidden_states.device:
            for other in (self.transformer, self.transformer_2):
                if other is not expert:
                    _send_to_host(other)
            expert.to(hidden_states.device)
        return _prediction(expert, hidden_states, *inputs, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Called by `.to(device)`: moves one after the other, so that never both are there."""
        for expert in (self.transformer, self.transformer_2):
            expert._apply(fn, recurse)
            if self.park:
                _send_to_host(expert)
        return self


def _prediction(expert: nn.Module, *inputs: Tensor, **options: Any) -> Tensor:
    prediction: Tensor = expert(*inputs, **{**options, "return_dict": False})[0]
    return prediction


def _send_to_host(expert: nn.Module) -> None:
    for name, tensor in (*expert.named_parameters(), *expert.named_buffers()):
        if ".lora_" not in name:
            tensor.data = tensor.data.cpu()
