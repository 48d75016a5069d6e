"""Diffusion-SDPO."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field

from dpo_video.loss.functional import sigmoid_loss, with_sft
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors, PerPair


@final
class SDPO(Loss):
    """Diffusion-SDPO: scales the rejected gradient so that the chosen video's error cannot rise.

    The loss `global` with another gradient (Fu et al. 2025, arXiv 2511.03317, Eq. 15-17). With
    `L_w`, `L_l` the policy's errors on the chosen and the rejected video, a step of length `eta`
    against `grad L_w - s grad L_l` changes `L_w` by
    `-eta (|grad L_w|^2 - s <grad L_w, grad L_l>)` to first order. That is `-eta mu |grad L_w|^2`
    or less for

        s = min(1, (1 - mu) |grad L_w|^2 / G) where G > 0, else 1,
        G = <grad L_w, grad L_l>.

    Gradients with respect to the weights would need a backward pass per video, so the paper uses
    those with respect to the network's outputs, which are the signed errors up to a constant:
    `|grad L_w|^2` is the mean of the chosen video's squared error, and `G` the mean of
    `policy_product`. The bound is exact where a step changes the outputs for both videos alike;
    they share noise and timestep, and 1 - mu is the tolerated difference. `s` is computed per pair
    (per batch in the authors' code) and bounds each pair's own step only. The value of the loss is
    that of `global`.
    """

    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """Slope on the margin of mean squared errors."""
    mu: float = Field(default=0.9, ge=0, le=1)
    """Fraction of the chosen video's own descent that must remain: at 0 its error may stay the
    same; at 1 the rejected video contributes only where that lowers the chosen video's error."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the chosen video, added to the loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        first, second = (
            change.mean(dim=(1, 2, 3, 4)) for change in (errors.change_first, errors.change_second)
        )
        label, scale = errors.label, self.rejected_scale(errors)
        output = sigmoid_loss(
            torch.where(label >= 0, first, _with_gradient_times(first, scale)),
            torch.where(label >= 0, _with_gradient_times(second, scale), second),
            label,
            self.beta,
        )
        return with_sft(output, errors, self.sft_weight)

    @torch.no_grad()
    def rejected_scale(self, errors: PairErrors) -> PerPair:
        """Scale `s` of the rejected video's gradient, in [0, 1]."""
        own = torch.where(
            errors.label >= 0,
            errors.policy_first.mean(dim=(1, 2, 3, 4)),
            errors.policy_second.mean(dim=(1, 2, 3, 4)),
        )
        product = errors.policy_product.mean(dim=(1, 2, 3, 4))
        aligned = product > 0
        bound = (1 - self.mu) * own / torch.where(aligned, product, 1.0)
        return torch.where(aligned, bound, 1.0).clamp(max=1.0)


def _with_gradient_times(values: PerPair, scale: PerPair) -> PerPair:
    """The same values to the bit, with the gradient scaled."""
    constant = values.detach()
    return constant + scale * (values - constant)
