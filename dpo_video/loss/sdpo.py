"""DPO whose loser may not pull the winner along."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field

from dpo_video.loss.functional import sigmoid_loss, with_sft
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors, PerPair


@final
class SDPO(Loss):
    """The loss `global`, with the loser's gradient scaled so that the winner's error cannot rise.

    Diffusion-SDPO (Fu et al. 2025, arXiv 2511.03317, Eq. 15-17). With `L_w`, `L_l` the policy's
    errors on winner and loser, a step of length `eta` against `grad L_w - s grad L_l` changes `L_w`
    by `-eta (|grad L_w|^2 - s <grad L_w, grad L_l>)` to first order. That is `-eta mu |grad L_w|^2`
    or less for

        s = min(1, (1 - mu) |grad L_w|^2 / G) where G > 0, else 1,
        G = <grad L_w, grad L_l>.

    Gradients on the weights would cost a backward pass per video, so the paper takes those on the
    network's outputs, which are the signed errors up to a constant: `|grad L_w|^2` is the mean of
    the winner's squared error, and `G` the mean of `policy_product`. The law is then exact
    where the network answers to a step alike for both videos; they share noise and level, and
    1 - mu is how far they may differ. Here `s` is one per pair (the authors' code takes one per
    batch), and nothing is promised of one pair's step for another's winner. The loss's value is
    that of `global`.
    """

    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """Slope on the margin of mean squared errors."""
    mu: float = Field(default=0.9, ge=0, le=1)
    """Share of the winner's own descent that must remain: 0 lets it stand still at worst; at 1 the
    loser pushes only where that helps the winner."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the chosen video, added to the loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """The loss of every pair."""
        first, second = (
            change.mean(dim=(1, 2, 3, 4)) for change in (errors.change_first, errors.change_second)
        )
        label, scale = errors.label, self.loser_scale(errors)
        output = sigmoid_loss(
            torch.where(label >= 0, first, _with_gradient_times(first, scale)),
            torch.where(label >= 0, _with_gradient_times(second, scale), second),
            label,
            self.beta,
        )
        return with_sft(output, errors, self.sft_weight)

    @torch.no_grad()
    def loser_scale(self, errors: PairErrors) -> PerPair:
        """`s` of every pair, in [0, 1]."""
        own = torch.where(
            errors.label >= 0,
            errors.policy_first.mean(dim=(1, 2, 3, 4)),
            errors.policy_second.mean(dim=(1, 2, 3, 4)),
        )
        shared = errors.policy_product.mean(dim=(1, 2, 3, 4))
        together = shared > 0
        bound = (1 - self.mu) * own / torch.where(together, shared, 1.0)
        return torch.where(together, bound, 1.0).clamp(max=1.0)


def _with_gradient_times(values: PerPair, scale: PerPair) -> PerPair:
    """The same values, to the bit, with another gradient."""
    still = values.detach()
    return still + scale * (values - still)
