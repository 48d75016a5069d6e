"""A metric for dpo-video that brings a library of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import numpy as np
import pywt
import torch
from pydantic import Field

from dpo_video.errors import UserError
from dpo_video.strategies import Metric
from dpo_video.types import PerPair, Videos


@final
class WaveletFlicker(Metric):
    """What pixels do over time and take back a moment later, on the 0-255 scale.

    The root mean square of the finest coefficients of a wavelet transform along time (Mallat 1989,
    IEEE TPAMI 11(7)). A wavelet with two vanishing moments gives 0 for a brightness that is still
    or changes evenly, where a difference of frames reads a fade as flicker. Edges that move fast
    count too, and a frozen video has none: read it beside `dynamic_degree`.
    """

    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "0-255"

    moments: int = Field(default=2, ge=1, le=8)
    """Vanishing moments of the Daubechies wavelet; 1 (Haar) sees every change."""

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One number a video; a UserError for videos of a single frame."""
        if videos.shape[2] < 2:
            raise UserError(
                "wavelet_flicker follows pixels over time, and these videos have only one frame. "
                "Use videos of 2 frames or more."
            )
        pixels = 255 * videos.double().cpu().numpy()
        wavelet = pywt.Wavelet(f"db{self.moments}")
        # The ends are continued smoothly, so that they do not count as flicker themselves.
        _, finest = pywt.dwt(pixels, wavelet, mode="smooth", axis=2)
        energy = np.square(finest).mean(axis=(1, 2, 3, 4))
        return torch.from_numpy(np.sqrt(energy)).float().to(videos.device)
