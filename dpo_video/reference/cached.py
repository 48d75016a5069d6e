"""Cached predictions as the reference."""

from __future__ import annotations

from typing import final

from pydantic import Field
from torch import nn

from dpo_video.reference.toggle import Toggled
from dpo_video.strategies import Reference, ReferenceModel


@final
class Cached(Reference):
    """Cached predictions: computed once before training, which saves a third of the forward work.

    Every pair has `noise_draws` draws of noise and timestep, used in turn. The reference's
    prediction for each is computed once, with the adapter off, and stored beside the pairs. Up to
    `noise_draws` epochs training equals `toggle` to the bit; later the draws repeat. The cost, on
    `tiny`: the mean gradient over 1, 4 or 16 draws of 2 pairs has a cosine of 0.67, 0.90 or 0.99
    with that over new draws (benchmarks/reference_cache.py). It saves time only if pairs are used
    more often than they have draws, or by several runs.
    """

    noise_draws: int = Field(default=4, ge=1)
    """Draws of noise and timestep per pair; the size on disk is proportional to it."""

    def attach(self, policy: nn.Module) -> ReferenceModel:
        """Use the policy with its adapter off for the predictions that are missing."""
        return Toggled(policy, noise_draws=self.noise_draws)
