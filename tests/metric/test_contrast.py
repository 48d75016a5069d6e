"""Contrast: pale and dark videos lose it, flicker and grain hardly change it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.rulers import LIGHTS, relight, texture
from dpo_video.metric.contrast import Contrast


@pytest.fixture(scope="module")
def video() -> Tensor:
    frames = [texture(96)[..., 16:80, 16 - t : 80 - t] for t in range(16)]
    return torch.stack(frames, dim=2)


def contrast(videos: Tensor) -> Tensor:
    return Contrast()(videos, [])


def test_half_black_and_half_white_has_all_contrast() -> None:
    video = torch.zeros(1, 3, 6, 8, 8)
    video[..., :4] = 1
    assert contrast(video).item() == pytest.approx(0.5)
    assert contrast(torch.full((1, 3, 2, 8, 8), 0.7)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("gain", "offset"), [(0.8, 0.1), (0.85, 0.0)])
def test_pale_and_dark_videos_lose_what_they_lost(
    video: Tensor, gain: float, offset: float
) -> None:
    assert torch.allclose(contrast(gain * video + offset), gain * contrast(video), rtol=1e-3)


@pytest.mark.parametrize("light", LIGHTS)
def test_flicker_and_grain_add_little(video: Tensor, light: str) -> None:
    lit = relight(video[0].transpose(0, 1), light, seed=4).transpose(0, 1)[None]
    assert (contrast(lit) / contrast(video)).item() == pytest.approx(1, abs=0.05)


def test_one_value_per_video(video: Tensor) -> None:
    both = contrast(torch.cat([video, 0.5 * video]))
    assert torch.allclose(both, torch.cat([contrast(video), contrast(0.5 * video)]))
