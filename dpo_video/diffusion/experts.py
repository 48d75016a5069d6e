"""Two denoisers that share the noise levels between them, as one network (Wan 2.2's A14B)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dpo_video.errors import UserError


@final
class Experts(nn.Module):
    """A high-noise and a low-noise denoiser; the level of each video says which one it goes to.

    They keep their names in the checkpoint, so that an adapter's keys begin with the name of the
    expert that they belong to.
    """

    def __init__(
        self, transformer: nn.Module, transformer_2: nn.Module, *, boundary: float, park: bool
    ) -> None:
        """Take both experts.

        Args:
            transformer: For timesteps from `boundary` up.
            transformer_2: For those below.
            boundary: A timestep.
            park: Keep the one that is not in use in the host's memory. Adapters stay where they
                are: an optimizer holds on to them.
        """
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2
        self.boundary, self.park = boundary, park

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any
    ) -> tuple[Tensor]:
        """As of either expert; timesteps are one a video, or one a token, equal in each video."""
        inputs = (hidden_states, timestep, encoder_hidden_states)
        if isinstance(timestep, FakeTensor):  # a level without a value; both experts cost the same
            return (_prediction(self.transformer, *inputs, **options),)
        high = timestep.reshape(len(timestep), -1)[:, 0] >= self.boundary
        if high.all():
            return (self._run(self.transformer, *inputs, **options),)
        if not high.any():
            return (self._run(self.transformer_2, *inputs, **options),)
        if self.park and torch.is_grad_enabled() and hidden_states.device.type != "cpu":
            raise UserError(
                "A batch needs both experts at once, and one of them is kept in the host's memory. "
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
        """What `.to(device)` calls: one after the other, so that both are never there at once."""
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
