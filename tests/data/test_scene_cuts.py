"""Scene cuts: found at splices of different scenes, and not in motion, flashes or fades."""

from __future__ import annotations

import pytest
import torch
from conftest import SHAPE
from test_video import CLIPS
from torch import Tensor

from dpo_video.data.fitting import fit_video
from dpo_video.data.scene_cuts import find_cuts
from dpo_video.data.video import read_video
from dpo_video.tiny import scenes
from dpo_video.types import VideoShape

FILM = VideoShape(frames=16, height=64, width=96, fps=8.0)


def real(name: str, start: float = 0.0) -> Tensor:
    footage = read_video(CLIPS / name, fps=FILM.fps, start=start, frames=16, cover=(64, 96))
    return fit_video(footage.frames, footage.fps, FILM)


@pytest.fixture(scope="module")
def shots() -> list[Tensor]:
    return [real("sitting_down.mp4"), real("grand_prix_1906.mp4")]


def test_a_splice_is_found_at_its_frame(shots: list[Tensor]) -> None:
    for one, other in (shots, shots[::-1]):
        for cut in (1, 5, 15):
            video = torch.cat([one[:, :cut], other[:, cut:]], dim=1)
            assert find_cuts(video) == [cut]
    one, other = shots
    twice = torch.cat([one[:, :4], other[:, 4:9], one[:, 9:]], dim=1)
    assert find_cuts(twice) == [4, 9]


def test_single_shots_have_none(shots: list[Tensor]) -> None:
    for video in shots:
        assert find_cuts(video) == []
    generator = torch.Generator().manual_seed(0)
    for video in scenes.render(scenes.draw_scenes(16, generator)).transpose(1, 2):
        assert find_cuts(video) == []


def test_flashes_and_fades_are_no_cuts(shots: list[Tensor]) -> None:
    one, other = shots
    flash = one.clone()
    flash[:, 7] = 1.0
    assert find_cuts(flash) == []
    share = torch.linspace(0, 1, 16)[None, :, None, None]
    assert find_cuts(one.lerp(other, share)) == []  # a dissolve, over two seconds
    assert find_cuts(one * share) == []
    plain = torch.ones(3, 16, 64, 96)
    assert find_cuts(plain * share) == []


def test_short_and_plain_videos_are_read(shots: list[Tensor]) -> None:
    assert find_cuts(shots[0][:, :1]) == []
    assert find_cuts(torch.zeros(3, SHAPE.frames, 16, 16)) == []
    jump = torch.cat([shots[0][:, :1], shots[1][:, :1]], dim=1)
    assert find_cuts(jump) == [1]
