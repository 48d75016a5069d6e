"""Warping error and frame difference on clips of known motion, flicker and noise."""

from __future__ import annotations

import sys

import pytest
import torch
from jaxtyping import Float
from kornia.filters import gaussian_blur2d
from torch import Tensor

from dpo_video.errors import UserError
from dpo_video.metric.dynamic_degree import DynamicDegree
from dpo_video.metric.frame_difference import FrameDifference
from dpo_video.metric.warp_error import WarpError
from dpo_video.tiny.scenes import draw_scenes, render


def sliding(count: int, step: int = 1, frames: int = 5) -> Float[Tensor, "b 3 F 64 64"]:
    """Textures that slide to the right by whole pixels."""
    noise = torch.rand(count, 3, 72, 72 + 64, generator=torch.Generator().manual_seed(0))
    texture = 4 * (gaussian_blur2d(noise, (13, 13), (3.0, 3.0)) - 0.5) + 0.5
    texture = texture.clamp(0, 1)[..., 4:-4, 4:-4]
    starts = [step * (frames - 1 - t) for t in range(frames)]
    return torch.stack([texture[..., s : s + 64] for s in starts], dim=2)


def unwarped(videos: Tensor) -> Tensor:
    return 255**2 * videos.diff(dim=2).square().mean(dim=(1, 2, 3, 4))


@pytest.fixture(scope="module")
def scenes() -> Float[Tensor, "b 3 F 64 64"]:
    return render(draw_scenes(6, torch.Generator().manual_seed(3))).movedim(2, 1).contiguous()


def test_correct_direction_is_below_no_warp_and_published_direction_above() -> None:
    videos = sliding(3)
    still, corrected = unwarped(videos), WarpError()(videos, [])
    assert (corrected < 0.02 * still).all()
    for variant in ("videodpo_lk", "videodpo_farneback"):
        assert (WarpError(flow=variant)(videos, []) > 1.5 * still).all()


def test_correct_direction_on_shapes(scenes: Tensor) -> None:
    still, corrected = unwarped(scenes), WarpError()(scenes, [])
    assert (corrected < 0.25 * still).all()
    assert corrected.mean() < 0.1 * still.mean()
    assert (WarpError(flow="videodpo_lk")(scenes, []) > still).all()


def test_the_published_direction_doubles_a_motion() -> None:
    # The per-pixel flow of a ramp is exact; the wrong direction is off by twice the motion.
    ramp = (torch.arange(64.0) / 128).expand(3, 64, 64)
    videos = torch.stack([ramp, ramp - 1 / 128], dim=1)[None]  # one pixel to the right
    wrong = WarpError(flow="videodpo_lk")(videos, [])
    assert torch.allclose(wrong, 4 * unwarped(videos), rtol=0.1)


def test_frozen_video_scores_zero(scenes: Tensor) -> None:
    frozen = scenes[:, :, :1].repeat(1, 1, 4, 1, 1)
    for variant in ("lucas_kanade", "videodpo_lk", "videodpo_farneback"):
        assert WarpError(flow=variant)(frozen, []).max() < 0.01


def test_flow_does_not_hide_flicker_of_colour() -> None:
    drawn = draw_scenes(24, torch.Generator().manual_seed(3))
    plain = drawn.background < 6  # a brightened pattern can look like a shifted one
    lit = 0.1 + 0.7 * render(drawn)[plain].movedim(2, 1)
    lit[:, :, 1::2] += 0.1
    flicker = 25.5**2
    error = WarpError()(lit, [])
    assert (error > 0.8 * flicker).all()
    assert (error < 1.2 * flicker).all()


def test_grain_adds_its_variance(scenes: Tensor) -> None:
    grain = 0.02 * torch.randn(scenes.shape, generator=torch.Generator().manual_seed(0))
    both_frames = 2 * (0.02 * 255) ** 2
    dim = 0.2 + 0.6 * scenes
    grainy, clean = WarpError()(torch.cat([dim + grain, dim]), []).chunk(2)
    added = grainy - clean
    # Sampling between pixels averages some of the grain.
    assert (added > 0.5 * both_frames).all()
    assert (added < 1.1 * both_frames).all()


def test_uncovered_pixels_do_not_count() -> None:
    ground = sliding(1, frames=1)[:, :, 0]
    frames = []
    for t in range(4):
        frame = ground.clone()
        frame[..., 20:40, 8 + 6 * t : 24 + 6 * t] = 1 - ground[..., 20:40, 8:24]
        frames.append(frame)
    videos = torch.stack(frames, dim=2)
    assert WarpError()(videos, []) < 0.1 * unwarped(videos)


def test_pair_without_any_match_counts_in_full() -> None:
    rising = torch.zeros(1, 3, 2, 32, 32)
    rising[:, :, 1] = 0.5
    assert WarpError()(rising, []) == pytest.approx((0.5 * 255) ** 2, rel=1e-4)


def test_batch_equals_single_videos(scenes: Tensor) -> None:
    for variant in ("lucas_kanade", "videodpo_lk", "videodpo_farneback"):
        metric = WarpError(flow=variant)
        alone = torch.cat([metric(video[None], []) for video in scenes[:2]])
        assert torch.allclose(metric(scenes, [])[:2], alone, rtol=1e-3)


def test_half_precision_videos_are_measured_in_float32(scenes: Tensor) -> None:
    error = WarpError()(scenes.bfloat16(), [])
    assert error.dtype == torch.float32


def test_frame_difference_by_hand(scenes: Tensor) -> None:
    videos = torch.zeros(2, 3, 3, 4, 4)
    videos[0, :, 1] = 0.4
    videos[1, :, 2, :2] = 1.0
    expected = torch.tensor([(0.4 + 0.4) / 2, (0 + 0.5) / 2]) * 255
    assert torch.allclose(FrameDifference()(videos, []), expected)
    assert FrameDifference()(scenes[:, :, :1].repeat(1, 1, 4, 1, 1), []).max() == 0


@pytest.mark.parametrize("metric", [WarpError(), FrameDifference()])
def test_single_frame_is_refused(metric: WarpError | FrameDifference) -> None:
    with pytest.raises(UserError, match="Use videos of 2 frames or more"):
        metric(torch.zeros(1, 3, 1, 32, 32), [])


def test_published_variant_without_opencv_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="pip install opencv-python-headless"):
        WarpError(flow="videodpo_farneback")(sliding(1), [])


@pytest.mark.parametrize("metric", [WarpError, DynamicDegree])
def test_the_witness_differs_in_the_flow_only(
    metric: type[WarpError] | type[DynamicDegree],
) -> None:
    for flow, name, second in (
        ("lucas_kanade", "DIS", "dis"),
        ("farneback", "DIS", "dis"),
        ("raft", "DIS", "dis"),
        ("dis", "Lucas-Kanade", "lucas_kanade"),
    ):
        first = metric(flow=flow, raft_weights="w")  # type: ignore[arg-type]
        found = first.witness()
        assert found == (name, metric(flow=second, raft_weights="w"))  # type: ignore[arg-type]
    assert FrameDifference().witness() is None
