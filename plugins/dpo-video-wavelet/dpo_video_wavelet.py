"""A dpo-video metric with its own dependency, PyWavelets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import numpy as np
import pywt
import torch

from dpo_video.plugin import Field, Metric, PerPair, UserError, Videos


@final
class WaveletFlicker(Metric):
    """Wavelet flicker: RMS of the finest wavelet coefficients along time, on the 0-255 scale.

    The finest level of a discrete wavelet transform (Mallat 1989, IEEE TPAMI 11(7)). A wavelet with
    two vanishing moments gives 0 for constant and for linearly changing brightness, whereas a
    difference of frames counts a fade as flicker. Fast edges raise it too, and a frozen video
    scores 0: read it together with `dynamic_degree`.
    """

    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "0-255"

    moments: int = Field(default=2, ge=1, le=8)
    """Vanishing moments of the Daubechies wavelet; 1 (Haar) responds to every change."""

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One value per video; UserError for videos of a single frame."""
        if videos.shape[2] < 2:
            raise UserError(
                "wavelet_flicker compares frames over time, and these videos have only one frame. "
                "Use videos of 2 frames or more."
            )
        pixels = 255 * videos.double().cpu().numpy()
        wavelet = pywt.Wavelet(f"db{self.moments}")
        # Smooth extension, so that the ends do not count as flicker.
        _, finest = pywt.dwt(pixels, wavelet, mode="smooth", axis=2)
        energy = np.square(finest).mean(axis=(1, 2, 3, 4))
        return torch.from_numpy(np.sqrt(energy)).float().to(videos.device)
