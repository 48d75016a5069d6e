from __future__ import annotations

import pytest
import torch
from jaxtyping import Float
from kornia.filters import gaussian_blur2d
from torch import Tensor

from dpo_video.metric.sharpness import Sharpness
from dpo_video.tiny.scenes import draw_scenes, render


@pytest.fixture(scope="module")
def videos() -> Float[Tensor, "b 3 F 64 64"]:
    return render(draw_scenes(10, torch.Generator().manual_seed(5))).movedim(2, 1).contiguous()


def blurred(videos: Tensor, sigma: float) -> Tensor:
    frames = videos.transpose(1, 2).flatten(0, 1)
    taps = 2 * round(3 * sigma) + 1
    soft = gaussian_blur2d(frames, (taps, taps), (sigma, sigma), border_type="replicate")
    return soft.unflatten(0, (len(videos), -1)).transpose(1, 2)


def sharpness(videos: Tensor) -> Tensor:
    return Sharpness()(videos, [])


def test_stronger_blur_lowers_sharpness_more(videos: Tensor) -> None:
    levels = [videos] + [blurred(videos, sigma) for sigma in (0.5, 0.7, 1.0, 1.5, 2.0, 3.0)]
    measured = torch.stack([sharpness(level) for level in levels])
    assert (measured.diff(dim=0) < 0).all()
    assert (measured[1] < 0.92 * measured[0]).all()  # a blur of half a pixel shows
    assert (measured[3] < 0.72 * measured[0]).all()


def test_sharpness_ignores_contrast_and_brightness(videos: Tensor) -> None:
    assert torch.allclose(sharpness(0.2 + 0.5 * videos), sharpness(videos), rtol=1e-4)
    assert torch.allclose(sharpness(1 - videos), sharpness(videos), rtol=1e-4)


def test_noise_does_not_count_as_sharpness(videos: Tensor) -> None:
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    for strength, tolerance in ((0.02, 0.04), (0.05, 0.08)):
        change = sharpness(videos + strength * noise).mean() / sharpness(videos).mean() - 1
        assert abs(change) < tolerance


def test_sharpness_ignores_motion(videos: Tensor) -> None:
    frozen = videos[:, :, 7:8].repeat(1, 1, 4, 1, 1)
    assert (sharpness(frozen) / sharpness(videos) - 1).abs().max() < 0.1
    assert (sharpness(frozen).mean() / sharpness(videos).mean() - 1).abs() < 0.02


def test_step_edge_by_hand() -> None:
    step = torch.zeros(1, 3, 1, 32, 32)
    step[..., 16:] = 0.8
    # Central differences are half the step at the two pixels beside it and 0 elsewhere.
    assert sharpness(step) == pytest.approx(0.5 * _share(), rel=1e-3)


def _share() -> float:
    """Share of the weights, which come from the smoothed edge, on these two pixels."""
    axis = torch.zeros(1, 1, 1, 32)
    axis[..., 16:] = 1
    smooth = gaussian_blur2d(axis.expand(1, 1, 9, 32), (5, 5), (1.0, 1.0), "replicate")[0, 0, 4]
    strength = (smooth[2:] - smooth[:-2]) / 2
    return float((strength[14:16] ** 3).sum() / (strength**3).sum())


def test_single_frame_without_edges_scores_zero() -> None:
    assert sharpness(torch.full((2, 3, 1, 32, 32), 0.3)).tolist() == [0.0, 0.0]


def test_batch_equals_single_videos(videos: Tensor) -> None:
    alone = torch.cat([sharpness(video[None]) for video in videos])
    assert torch.allclose(sharpness(videos), alone, rtol=1e-4)
