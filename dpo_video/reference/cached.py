"""The reference as predictions made once, ahead of training."""

from __future__ import annotations

from typing import final

from pydantic import Field
from torch import nn

from dpo_video.reference.toggle import Toggled
from dpo_video.strategies import Reference, ReferenceModel


@final
class Cached(Reference):
    """Predictions stored ahead of training: no reference runs in it, a third of the forward work.

    Every pair has a bank of `draws` noises and levels, and its visits take them in turn; what the
    reference predicts for each is made once, with the adapter off, and kept beside the pairs. Up to
    `draws` epochs this is `toggle` to the bit, later the draws repeat. The price, on `tiny`: the
    mean gradient over 1, 4 or 16 draws of 2 pairs has a cosine of 0.67, 0.90 or 0.99 with that over
    fresh ones (benchmarks/reference_cache.py). Time is saved only where pairs are visited more
    often than they have draws, or by several runs.
    """

    noise_draws: int = Field(default=4, ge=1)
    """Noises and levels of each pair; the bank's size on the disk grows with it."""

    def attach(self, policy: nn.Module) -> ReferenceModel:
        """The policy with its adapter off, for as long as predictions are missing."""
        return Toggled(policy, noise_draws=self.noise_draws)
