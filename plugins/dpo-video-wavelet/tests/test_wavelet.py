"""Tests of the metric; run `pytest` in this folder after installing the package."""

from __future__ import annotations

import pytest
import torch
from dpo_video_wavelet import WaveletFlicker

from dpo_video.errors import UserError
from dpo_video.testing import check_metric, small_videos

PROMPTS = ["one", "two"]


def test_metric_meets_the_contract() -> None:
    check_metric(WaveletFlicker())
    check_metric(WaveletFlicker(moments=1))


def test_metric_increases_with_flicker() -> None:
    videos = 0.2 + 0.5 * small_videos(2, frames=8)
    signs = torch.tensor([1.0, -1.0]).repeat(4)[:, None, None]
    little, much = (WaveletFlicker()(videos + s * signs, PROMPTS) for s in (0.02, 0.1))
    assert (WaveletFlicker()(videos, PROMPTS) < little).all() and (little < much).all()


def test_haar_coefficient_by_hand() -> None:
    """Haar: neighbours a and -a give (a - -a) / sqrt(2)."""
    signs = torch.tensor([1.0, -1.0]).repeat(4)[None, None, :, None, None]
    video = (0.5 + signs * 10 / 255).expand(1, 3, 8, 4, 4)
    assert WaveletFlicker(moments=1)(video, ["flat"]).item() == pytest.approx(20 / 2**0.5)


def test_a_fade_is_not_flicker() -> None:
    fade = torch.linspace(0, 1, 16)[None, None, :, None, None].expand(1, 3, 16, 4, 4)
    assert WaveletFlicker()(fade, ["fade"]).item() == pytest.approx(0, abs=1e-3)
    assert WaveletFlicker(moments=1)(fade, ["fade"]).item() > 5


def test_single_frame_is_refused() -> None:
    with pytest.raises(UserError, match="only one frame"):
        WaveletFlicker()(small_videos(2, frames=1), PROMPTS)
