"""Dynamic degree on clips of known motion: motion counts, flicker does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from kornia.filters import gaussian_blur2d
from torch import Generator, Tensor

from benchmarks.rulers import texture
from benchmarks.tiny.recipe import flicker
from dpo_video.data.video import read_video
from dpo_video.errors import UserError
from dpo_video.metric._flow import dense_flow, warp
from dpo_video.metric._flow_methods import flow_between
from dpo_video.metric.dynamic_degree import DynamicDegree
from dpo_video.tiny.scenes import MOTIONS, SIZE, SPEEDS, Scenes, draw_scenes, render

CLIPS = Path(__file__).parents[1] / "clips"
DIAGONAL = math.hypot(SIZE, SIZE)
EACH = 1  # scene of every motion and speed


def degree(videos: Tensor) -> Tensor:
    return DynamicDegree()(videos, [])


def pick(scenes: Scenes, index: Tensor) -> Scenes:
    return replace(scenes, **{f.name: getattr(scenes, f.name)[index] for f in fields(scenes)})


def filmed(scenes: Scenes) -> Float[Tensor, "b 3 F 64 64"]:
    return render(scenes).movedim(2, 1).contiguous()


def per_frame(videos: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    frames = change(videos.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (len(videos), -1)).transpose(1, 2).contiguous()


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """Every motion at both speeds, without discs, whose spin is invisible."""
    drawn = draw_scenes(400, Generator().manual_seed(11))
    chosen = [
        ((drawn.motion == motion) & (drawn.speed == speed) & (drawn.shape > 0)).nonzero()[:EACH, 0]
        for speed in range(len(SPEEDS))
        for motion in range(len(MOTIONS))
    ]
    return pick(drawn, torch.cat(chosen))


@pytest.fixture(scope="module")
def videos(scenes: Scenes) -> Float[Tensor, "b 3 F 64 64"]:
    return filmed(scenes)


# --- flicker, new in every frame -------------------------------------------------------------


def grain(videos: Tensor, seed: int = 1, strength: float = 0.05) -> Tensor:
    noise = torch.randn(videos.shape, generator=Generator().manual_seed(seed))
    return (videos + strength * noise).clamp(0, 1)


def tint(videos: Tensor, seed: int = 2) -> Tensor:
    """A random offset of up to 0.1 for every channel of every frame."""
    offset = torch.rand(*videos.shape[:3], 1, 1, generator=Generator().manual_seed(seed))
    return (videos + 0.2 * (offset - 0.5)).clamp(0, 1)


def wobble(videos: Tensor, seed: int = 3, strength: float = 0.7) -> Tensor:
    """Outlines displaced by smooth noise of `strength` pixels."""

    def bend(frames: Tensor) -> Tensor:
        generator = Generator().manual_seed(seed)
        field = torch.randn(len(frames), 2, *frames.shape[-2:], generator=generator)
        field = gaussian_blur2d(field, (17, 17), (4.0, 4.0))
        return warp(frames, strength * field / field.std())

    return per_frame(videos, bend)


def boil(videos: Tensor, seed: int = 4) -> Tensor:
    """Flickering soft patches of light, as in the embedded model's videos."""
    gains = flicker(len(videos), Generator().manual_seed(seed), videos.shape[2])
    return (videos * gains.transpose(1, 2)).clamp(0, 1)


FLICKERS = [grain, tint, wobble, boil]


def leaping(scenes: Scenes, frame: int) -> Tensor:
    """A still shape that jumps to another place between two frames."""
    center = scenes.center[:, 7:8].repeat(1, 16, 1)
    center[:, frame:] += torch.where(center[:, :1] > SIZE / 2, -14.0, 14.0)
    angle = scenes.angle[:, 7:8].repeat(1, 16)
    return filmed(replace(scenes, center=center, angle=angle))


def smooth(videos: Tensor) -> Tensor:
    """The mean of every three frames: two frames less."""
    return F.avg_pool3d(videos, (3, 1, 1), stride=1)


@pytest.fixture(scope="module")
def degrees(scenes: Scenes, videos: Tensor) -> dict[str, Tensor]:
    """Of the same scenes in many ways, all in one batch, which takes a fraction of the time."""
    some = torch.arange(0, len(videos), 2)  # every second one: how they would move is of no effect
    frozen = videos[some, :, 7:8].repeat(1, 1, 16, 1, 1)
    ways = {
        "clean": videos,
        "frozen": frozen,
        "leap at 3": leaping(pick(scenes, some), 3),
        "leap at 8": leaping(pick(scenes, some), 8),
    }
    for fault in FLICKERS:
        ways[fault.__name__] = fault(videos)
        ways[f"frozen {fault.__name__}"] = fault(frozen)
    found = degree(torch.cat(list(ways.values())))
    return dict(zip(ways, found.split([len(each) for each in ways.values()]), strict=True))


@pytest.fixture(scope="module")
def clean(degrees: dict[str, Tensor]) -> Tensor:
    return degrees["clean"]


# --- laws ------------------------------------------------------------------------------------


def test_degree_is_the_speed_of_the_shape(scenes: Scenes, clean: Tensor) -> None:
    step = scenes.center.diff(dim=1).norm(dim=-1)
    truth = 100 / DIAGONAL * step.square().mean(1).sqrt()
    travels = truth > 0
    ratio = (clean / truth)[travels]
    assert (ratio > 0.8).all()
    assert (ratio < 1.3).all()
    assert 0.95 < ratio.mean() < 1.15


def test_spinning_in_place_is_motion(scenes: Scenes, clean: Tensor) -> None:
    spinning = scenes.motion == MOTIONS.index("spinning")
    rim = 100 / DIAGONAL * scenes.angle.diff(dim=1).abs().mean(1) * scenes.radius
    ratio = (clean / rim)[spinning]
    assert (ratio > 0.4).all()
    assert (ratio < 1.3).all()


@pytest.mark.parametrize("fault", FLICKERS)
def test_flicker_neither_adds_nor_hides_motion(
    fault: Callable[[Tensor], Tensor], degrees: dict[str, Tensor], clean: Tensor
) -> None:
    flickering = degrees[fault.__name__]
    assert abs(flickering.mean() / clean.mean() - 1) < 0.05
    # Read backwards, the same law: removing flicker does not lower the degree.
    assert (flickering > 0.5 * clean).float().mean() > 0.9


@pytest.mark.parametrize("fault", FLICKERS)
def test_a_frozen_clip_that_flickers_does_not_move(
    fault: Callable[[Tensor], Tensor], degrees: dict[str, Tensor], clean: Tensor
) -> None:
    assert degrees[f"frozen {fault.__name__}"].mean() < 0.03 * clean.mean()


@pytest.mark.parametrize("frame", [3, 8])
def test_a_leap_is_not_motion(frame: int, degrees: dict[str, Tensor], clean: Tensor) -> None:
    assert degrees[f"leap at {frame}"].mean() < 0.03 * clean.mean()


def test_flow_of_consecutive_frames_reads_flicker_as_motion(videos: Tensor, clean: Tensor) -> None:
    frames = wobble(videos[:, :, 7:8].repeat(1, 1, 4, 1, 1)).transpose(1, 2)
    flow = dense_flow(frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1))
    fastest = flow.norm(dim=1).flatten(1).topk(round(0.05 * SIZE**2), dim=1).values
    assert 100 / DIAGONAL * fastest.mean() > 0.5 * clean.mean()


def test_removing_flicker_does_not_lower_the_degree(videos: Tensor) -> None:
    grainy = grain(videos)
    smoothed, as_it_is = degree(torch.cat([smooth(grainy), grainy[:, :, 1:-1]])).chunk(2)
    assert smoothed.mean() > 0.95 * as_it_is.mean()


def test_frozen_video_scores_zero(degrees: dict[str, Tensor]) -> None:
    assert degrees["frozen"].max() < 1e-4


def test_every_second_frame_moves_twice_as_fast() -> None:
    drawn = draw_scenes(60, Generator().manual_seed(2), frames=31)
    straight = (drawn.motion < 4).nonzero()[:4, 0]
    slow = filmed(pick(drawn, straight))
    fast, usual = degree(torch.cat([slow[:, :, ::2], slow[:, :, 8:24]])).chunk(2)
    assert torch.allclose(fast / usual, torch.tensor(2.0), rtol=0.12)


def test_degree_increases_with_speed() -> None:
    still = pick(draw_scenes(40, Generator().manual_seed(2)), torch.arange(2))
    time = torch.arange(16.0) - 7.5
    paces = []
    for pace in (0.0, 0.25, 0.5, 1.0, 2.0):
        center = 32 + torch.stack([pace * time, 0 * time], dim=-1)
        moving = replace(still, center=center.repeat(2, 1, 1), angle=torch.zeros(2, 16))
        paces.append(filmed(moving))
    measured = degree(torch.cat(paces)).unflatten(0, (5, 2))
    assert (measured.diff(dim=0) > 0).all()


def test_small_object_on_still_background_counts() -> None:
    axis = torch.arange(96.0)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    paces = torch.tensor([0.75, 1.5, 4.0, 8.0])
    time = torch.arange(-4, 5)[:, None, None]
    frames = [(x - 48 - pace * time).square() + (y - 48).square() < 64 for pace in paces]
    balls = torch.stack(frames).float()[:, None].repeat(1, 3, 1, 1, 1)  # 2% of the picture
    assert torch.allclose(degree(balls), 100 * paces / math.hypot(96, 96), rtol=0.2)


@pytest.mark.parametrize(
    ("frames", "tolerance"), [(2, 0.5), (3, 0.2), (4, 0.2), (5, 0.1), (8, 0.1), (9, 0.1), (23, 0.1)]
)
def test_any_number_of_frames(frames: int, tolerance: float) -> None:
    drawn = pick(draw_scenes(60, Generator().manual_seed(2), frames=23), torch.arange(30))
    moving = pick(drawn, (drawn.motion < 4).nonzero()[:4, 0])
    truth = 100 / DIAGONAL * moving.center.diff(dim=1).norm(dim=-1).mean(1)
    assert torch.allclose(degree(filmed(moving)[:, :, :frames]), truth, rtol=tolerance)


def filmed_by_hand(path: Tensor, square: float = 0.0, size: int = 96) -> Tensor:
    """A texture under a camera at the points of `path`; a square of half its size moves over it."""
    ground, patch = texture(size + 40), texture(size, seed=7)
    frames = []
    for t, point in enumerate(path - path[len(path) // 2]):
        scene = ground.clone()
        left = 44 + round(square * (t - len(path) // 2))
        scene[..., 44 : 44 + size // 2, left : left + size // 2] = patch[..., ::2, ::2]
        flow = point[:, None, None].expand(2, *scene.shape[-2:])
        frames.append(warp(scene, flow[None])[..., 20:-20, 20:-20])
    return torch.cat(frames).transpose(0, 1)[None]


def trembling(strength: float, frames: int = 16) -> Tensor:
    return strength * torch.randn(frames, 2, generator=Generator().manual_seed(0))


@pytest.mark.parametrize(("strength", "tolerance"), [(0.3, 0.05), (1.0, 0.05), (2.0, 0.2)])
def test_a_trembling_camera_is_not_motion_and_hides_none(strength: float, tolerance: float) -> None:
    still, moving = (filmed_by_hand(trembling(strength), speed) for speed in (0.0, 2.0))
    assert degree(still) < 0.01
    assert degree(moving).item() == pytest.approx(200 / math.hypot(96, 96), rel=tolerance)


def test_a_camera_that_pans_and_trembles_moves() -> None:
    pan = torch.stack([torch.arange(16.0) - 8, torch.zeros(16)], dim=1)
    truth = 100 / math.hypot(96, 96)
    assert degree(filmed_by_hand(pan)).item() == pytest.approx(truth, rel=0.1)
    assert degree(filmed_by_hand(pan + trembling(0.5))).item() == pytest.approx(truth, rel=0.2)


@pytest.mark.parametrize("frame", [3, 8])
def test_a_leap_of_the_camera_is_not_motion(frame: int) -> None:
    path = torch.zeros(16, 2)
    path[frame:, 0] = 12
    assert degree(filmed_by_hand(path)) < 0.01


def test_single_frame_is_refused() -> None:
    with pytest.raises(UserError, match="Use videos of 2 frames or more"):
        degree(torch.zeros(1, 3, 1, 32, 32))


def test_batch_equals_single_videos(videos: Tensor) -> None:
    short = videos[:3, :, :6]
    alone = torch.cat([degree(video[None]) for video in short])
    assert torch.allclose(degree(short), alone, rtol=1e-2)


def test_real_clips() -> None:
    measured, witness = {}, {}
    for name, starts in (("grand_prix_1906", (0,)), ("sitting_down", (0, 3))):
        videos = [
            read_video(CLIPS / f"{name}.mp4", start=start, frames=16).frames / 255
            for start in starts
        ]
        video = videos[0][None]
        frozen = grain(video[:, :, 7:8].repeat(1, 1, 16, 1, 1))
        batch = torch.cat([torch.stack(videos), frozen, grain(video, strength=0.02)])
        *moving, still, grainy = degree(batch)
        assert still < 0.03
        assert torch.allclose(grainy, moving[0], rtol=0.1)
        for start, each, found in zip(starts, videos, moving, strict=True):
            measured[name, start] = found
            witness[name, start] = fastest_by_dis(each[None])
    # A girl walks through the room, then sits still: no flicker, so the flow of consecutive frames
    # tells the speed too. An old film: its light and its frames tremble, which adds to that flow.
    for start in (0, 3):
        assert measured["sitting_down", start] == pytest.approx(witness["sitting_down", start], 0.2)
    assert measured["grand_prix_1906", 0] < 0.8 * witness["grand_prix_1906", 0]


def fastest_by_dis(video: Tensor) -> float:
    """The fastest 5% by OpenCV's flow of consecutive frames, in % of the diagonal."""
    frames = video[0].transpose(0, 1)
    width = round(128 * frames.shape[-1] / frames.shape[-2])
    small = F.interpolate(frames, size=(128, width), mode="bilinear", antialias=True)
    speed = flow_between("dis", small[:-1], small[1:]).norm(dim=1).flatten(1)
    fastest = speed.topk(speed.shape[1] // 20, dim=1).values.mean()
    return float(fastest) * 100 / math.hypot(128, width)
