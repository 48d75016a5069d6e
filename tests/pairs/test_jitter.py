"""Jitter: the documented noise, drawn anew for every frame, and no other difference."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.errors import UserError
from dpo_video.pairs.jitter import Jitter, jitter
from dpo_video.testing import check_pairs
from dpo_video.types import Clip

GREY = torch.full((2, 3, 6, 64, 64), 0.5)  # far from both ends: nothing is clipped at 0.05


def added(noise: float, seed: int = 0) -> Tensor:
    return jitter(GREY, noise, Generator().manual_seed(seed)) - GREY


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_the_grain_is_gaussian_with_the_stated_deviation(noise: float) -> None:
    difference = added(noise)
    grain = difference - difference.mean(dim=(3, 4), keepdim=True)
    assert grain.std().item() == pytest.approx(noise, rel=0.02)
    scaled = grain / noise
    assert scaled.pow(3).mean().abs() < 0.05  # symmetric
    assert scaled.pow(4).mean().item() == pytest.approx(3, rel=0.05)  # uniform noise has 1.8


def test_the_shift_is_uniform_within_a_quarter_and_by_channel() -> None:
    noise = 0.04
    shifts = torch.cat([added(noise, seed).mean(dim=(3, 4)).flatten() for seed in range(40)])
    slack = 5 * noise / 64  # five standard errors of a mean over 64x64 pixels
    assert shifts.abs().max() < noise / 4 + slack
    assert shifts.abs().max() > 0.95 * noise / 4
    assert shifts.mean().abs() < 5 * noise / 4 / (3 * len(shifts)) ** 0.5
    # A uniform draw on [-a, a] has the deviation a / sqrt(3).
    assert shifts.std().item() == pytest.approx(noise / 4 / 3**0.5, rel=0.1)


def test_every_frame_channel_and_video_has_its_own_draw() -> None:
    difference = added(0.05)
    frames = difference.transpose(1, 2).flatten(0, 1).flatten(1)
    correlation = torch.corrcoef(frames) - torch.eye(len(frames))
    assert correlation.abs().max() < 0.1
    shifts = difference.mean(dim=(3, 4)).flatten()
    assert len(shifts.unique()) == len(shifts)


def test_pixels_are_clipped_to_their_range() -> None:
    ends = torch.stack([torch.zeros(3, 2, 8, 8), torch.ones(3, 2, 8, 8)])
    noisy = jitter(ends, 0.3, Generator().manual_seed(0))
    assert noisy.min() == 0 and noisy.max() == 1
    assert (noisy[0] == 0).any() and (noisy[0] > 0).any()
    assert (noisy[1] == 1).any() and (noisy[1] < 1).any()


def test_the_input_is_unchanged_and_the_seed_determines_the_result() -> None:
    video = GREY.clone()
    assert torch.equal(added(0.05, 1), added(0.05, 1))
    assert not torch.equal(added(0.05, 1), added(0.05, 2))
    assert torch.equal(video, GREY)


@pytest.mark.parametrize("chosen", ["sample", "clip"])
def test_one_call_encodes_both_videos(
    small_model: AnimateDiffModel, clip: Clip, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder, the precision and the batch are the same."""
    seen: list[Tensor] = []
    original = small_model.encode_videos

    def spy(videos: Tensor) -> Tensor:
        seen.append(videos)
        return original(videos)

    monkeypatch.setattr(small_model, "encode_videos", spy)
    builder = Jitter(chosen=chosen, noise=0.2)  # type: ignore[arg-type]
    pair = builder(clip, small_model, None, Generator().manual_seed(0))
    assert len(seen) == 1 and len(seen[0]) == 2
    first, second = original(seen[0])
    assert torch.equal(pair.first, first) and torch.equal(pair.second, second)
    difference = seen[0][1] - seen[0][0]
    assert 0.02 < difference.std() < 0.25
    if chosen == "clip":
        assert clip.video is not None and torch.equal(seen[0][0], clip.video)


def test_the_chosen_video_is_first_everywhere_and_all_may_differ(
    small_model: AnimateDiffModel, clip: Clip
) -> None:
    pair = Jitter()(clip, small_model, None, Generator().manual_seed(0))
    assert (pair.preference == 1).all() and (pair.region == 1).all()
    assert pair.strength == 0 and pair.prompt == clip.caption and pair.source == "own sample"
    real = Jitter(chosen="clip")(clip, small_model, None, Generator().manual_seed(0))
    assert real.source == clip.name


def test_the_sample_is_drawn_with_the_given_options(
    small_model: AnimateDiffModel, clip: Clip
) -> None:
    drawn = [
        Jitter(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)(
            clip, small_model, None, Generator().manual_seed(0)
        ).first
        for num_inference_steps, guidance_scale in ((None, None), (4, 2.0), (2, 2.0), (4, 1.0))
    ]
    assert torch.equal(drawn[0], drawn[1])  # the small model's own settings
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])


def test_videos_are_needed_only_if_they_are_chosen(
    small_model: AnimateDiffModel, clip: Clip
) -> None:
    check_pairs(Jitter(chosen="sample"), small_model, clip=clip)
    check_pairs(Jitter(chosen="clip"), small_model, clip=clip)
    bare = Clip(name="prompt", caption=clip.caption)
    with pytest.raises(UserError, match=r"--clips DIR.*--set pairs\.chosen=sample"):
        Jitter(chosen="clip")(bare, small_model, None, Generator())
