"""Repeated frames are counted; uneven motion, flicker and compression are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from dpo_video.data.video import read_video
from dpo_video.metric.new_frames import NewFrames

CLIPS = Path(__file__).parents[1] / "clips"


@pytest.fixture(scope="module", params=["grand_prix_1906", "sitting_down"])
def clip(request: pytest.FixtureRequest) -> Tensor:
    return read_video(CLIPS / f"{request.param}.mp4", frames=16).frames[None] / 255


def new_frames(videos: Tensor) -> float:
    return NewFrames()(videos, []).item()


def test_every_frame_of_a_real_clip_is_new_under_flicker_too(clip: Tensor) -> None:
    assert new_frames(clip) == 1
    gains = 1 + 0.1 * torch.randn(16, generator=Generator().manual_seed(0))
    assert new_frames(clip * gains[:, None, None]) == 1


def test_held_frames_are_counted(clip: Tensor) -> None:
    held = clip[:, :, ::2].repeat_interleave(2, dim=2)
    assert new_frames(held) == pytest.approx(7 / 15)
    grain = 0.0005 * torch.randn(held.shape, generator=Generator().manual_seed(0))
    assert new_frames(held + grain) == pytest.approx(7 / 15)  # of an encoder
    once = clip.clone()
    once[:, :, 9] = once[:, :, 8]
    assert new_frames(once) == pytest.approx(14 / 15)


def test_videos_without_change_repeat_nothing(clip: Tensor) -> None:
    assert new_frames(clip[:, :, :1].expand_as(clip)) == 1
    assert new_frames(clip[:, :, :1]) == 1
    assert NewFrames()(clip.expand(2, -1, -1, -1, -1), []).tolist() == [1, 1]
