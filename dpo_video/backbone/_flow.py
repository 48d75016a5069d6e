"""Training timesteps of flow matching: the distribution of the noise level sigma."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Generator

from dpo_video.types import PerPair

TimestepSampling = Literal["logit_normal", "uniform"]


@final
@dataclass(frozen=True, kw_only=True)
class SigmaDistribution:
    """Sigmas drawn from a base distribution in (0, 1), shifted, and kept to a range."""

    sampling: TimestepSampling
    """The sigmoid of N(0, 1), or uniform."""
    shift: float
    """`shift s / (1 + (shift - 1) s)` moves them towards noise."""
    low: float = 0.0
    """Smallest sigma, after the shift."""
    high: float = 1.0
    """Largest sigma, after the shift."""

    def sample(self, n: int, generator: Generator) -> PerPair:
        """Draw `n` sigmas by the inverse of their cumulative distribution."""
        low, high = self._share_below(self.low), self._share_below(self.high)
        drawn = low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
        if self.sampling == "logit_normal":
            drawn = torch.special.ndtri(drawn).sigmoid()
        return self.shift * drawn / (1 + (self.shift - 1) * drawn)

    def _share_below(self, sigma: float) -> float:
        """Cumulative distribution function without the range."""
        if sigma in (0.0, 1.0):
            return sigma
        unshifted = sigma / (self.shift - (self.shift - 1) * sigma)
        if self.sampling == "uniform":
            return unshifted
        return torch.special.ndtr(torch.logit(torch.tensor(unshifted, dtype=torch.float64))).item()
