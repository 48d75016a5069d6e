"""Laws of the rulers: light is not motion, uncovered pixels are masked, half the motion is half."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from benchmarks.rulers import (
    endpoint_error,
    masked_shares,
    moving,
    relight,
    still,
    texture,
    warp_error_ratio,
)
from benchmarks.tiny.recipe import flicker
from dpo_video.data.video import read_video
from dpo_video.errors import UserError
from dpo_video.metric import _flow_methods
from dpo_video.metric._flow import Flow, Frames, even_light, warp
from dpo_video.metric._flow_methods import FlowMethod, flow_between
from dpo_video.metric.dynamic_degree import DynamicDegree
from dpo_video.metric.warp_error import WarpError
from dpo_video.tiny.scenes import draw_scenes, render

LIGHTS = ["none", "global", "white", "coloured"]
CLIP = Path(__file__).parents[1] / "clips" / "grand_prix_1906.mp4"


def lucas_kanade(first: Frames, second: Frames) -> Flow:
    return flow_between("lucas_kanade", first, second)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("light", LIGHTS[1:])
def test_changing_light_on_a_still_picture_is_no_motion(light: str, size: int) -> None:
    ratio = warp_error_ratio("lucas_kanade", *still(size, light))
    assert torch.allclose(ratio.mean(), torch.ones(()), atol=0.05)


def test_flicker_on_flat_shapes_is_mostly_counted() -> None:
    """The scenes of `tiny`, which have no texture but the light; 0.34 without the check."""
    scene = render(draw_scenes(4, Generator().manual_seed(0)))[:, :1]
    lit = (scene * flicker(4, Generator().manual_seed(1))).clamp(0, 1).transpose(1, 2)
    true = 255**2 * lit.diff(dim=2).square().mean()
    assert WarpError()(lit, []).mean() > 0.6 * true


@pytest.mark.parametrize("size", [64, 128])
def test_grain_hides_no_more_than_under_farneback(size: int) -> None:
    pair = still(size, "grain")
    ours, farneback = (
        warp_error_ratio(flow, *pair).mean() for flow in ("lucas_kanade", "farneback")
    )
    assert ours > farneback - 0.01


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("light", LIGHTS[1:])
def test_changing_light_at_most_doubles_the_endpoint_error(light: str, size: int) -> None:
    first, second, truth = moving(size, "none")
    clean = endpoint_error(lucas_kanade(first, second), truth)
    first, second, truth = moving(size, light)
    assert endpoint_error(lucas_kanade(first, second), truth) < 2 * clean


@pytest.mark.parametrize("light", LIGHTS[1:])
def test_even_light_takes_out_changes_of_light_and_keeps_the_picture(light: str) -> None:
    first, second = still(96, light)
    lit, even = (first - second).std(), (even_light(first) - even_light(second)).std()
    assert even < 0.5 * lit * even_light(first).std() / first.std()
    picture = texture(96)
    shade = torch.linspace(0.3, 1, 96)  # from left to right
    assert (even_light(picture * shade) - even_light(picture)).std() < 0.2 * 0.3
    assert even_light(torch.full((1, 3, 20, 20), 0.4)).sub(0.5).abs().max() < 1e-4


@pytest.mark.parametrize("motion", [(2, 1), (4, 2), (8, 3)])
def test_uncovered_pixels_are_masked_at_any_motion(motion: tuple[int, int]) -> None:
    uncovered, others = masked_shares(lucas_kanade, motion)
    assert uncovered > 0.9
    assert others < 0.1


@pytest.mark.parametrize("side", [16, 32])
def test_small_object_on_a_still_texture_is_tracked(side: int) -> None:
    ground, square = texture(128), texture(128, seed=9)
    first, second = ground.clone(), ground.clone()
    first[..., 50 : 50 + side, 50 : 50 + side] = square[..., :side, :side]
    second[..., 54 : 54 + side, 55 : 55 + side] = square[..., :side, :side]
    flow = lucas_kanade(first, second)[0, :, 50 : 50 + side, 50 : 50 + side]
    assert torch.allclose(flow.flatten(1).median(1).values, torch.tensor([5.0, 4.0]), atol=0.7)


@pytest.mark.parametrize("flow", ["lucas_kanade", "dis", "farneback"])
def test_every_flow_serves_the_metrics(flow: FlowMethod) -> None:
    frames = [texture(96)[..., 16:80, 16 - t : 80 - t] for t in range(6)]
    video = torch.stack(frames, dim=2)  # one pixel per frame to the right
    assert WarpError(flow=flow)(video, []) < 0.1 * 255**2 * video.diff(dim=2).square().mean()
    degree = DynamicDegree(flow=flow)(video, [])
    assert degree == pytest.approx(100 / (64 * 2**0.5), rel=0.1)


def test_missing_parts_of_a_flow_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frames = torch.rand(1, 3, 32, 32)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="pip install opencv-python-headless"):
        flow_between("dis", frames, frames)
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    with pytest.raises(UserError, match="needs torchvision"):
        flow_between("raft", frames, frames)
    monkeypatch.setitem(
        sys.modules,
        "torchvision.models.optical_flow",
        SimpleNamespace(raft_large=None, raft_small=None),
    )
    with pytest.raises(UserError, match="raft_weights=PATH"):
        flow_between("raft", frames, frames, raft_weights=str(tmp_path / "none.pth"))


def test_raft_is_given_frames_in_its_own_range_and_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for torchvision's network, which is not installed: the real one is not run."""
    received: list[Tensor] = []

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feature_encoder = nn.Module()
            self.feature_encoder.convnormrelu = nn.Sequential(nn.Conv2d(3, 32, 1))

        def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
            received.extend([first, second])
            return [torch.zeros_like(first[:, :2]), torch.ones_like(first[:, :2])]

    module = ModuleType("torchvision.models.optical_flow")
    vars(module).update(raft_small=lambda weights: Network(), raft_large=None)
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", module)
    path = tmp_path / "raft.safetensors"
    save_file(Network().state_dict(), path)
    _flow_methods._load_raft.cache_clear()
    frames = torch.rand(2, 3, 60, 130)
    flow = flow_between("raft", frames, 1 - frames, raft_weights=str(path))
    _flow_methods._load_raft.cache_clear()
    assert flow.shape == (2, 2, 60, 130) and (flow == 1).all()  # the last update
    assert len(received) == 4 and received[0].shape == (1, 3, 128, 136)
    assert torch.allclose(received[0][..., :60, :130], 2 * frames[:1] - 1)


def panned(speed: float, frames: int = 16) -> Tensor:
    """A window that moves over a photograph by `speed` pixels to the right per frame."""
    photograph = read_video(CLIP, start=1.0, frames=1).frames[:, 0] / 255
    flow = torch.zeros(frames, 2, *photograph.shape[-2:])
    flow[:, 0] += speed * torch.arange(frames)[:, None, None]
    moved = warp(photograph.expand(frames, -1, -1, -1), flow)
    return moved[..., 60:220, 40:200].transpose(0, 1)[None]


@pytest.fixture(scope="module")
def degrees() -> dict[str, Tensor]:
    """Of slow and fast motion under every light, in one batch, which takes less time."""
    videos = [panned(speed)[0].transpose(0, 1) for speed in (1.5, 3.0)]
    lit = [relight(video, light, seed=4).transpose(0, 1) for light in LIGHTS for video in videos]
    return dict(zip(LIGHTS, DynamicDegree()(torch.stack(lit), []).split(2), strict=True))


@pytest.mark.parametrize("light", LIGHTS)
def test_half_the_motion_of_a_photograph_reads_half_under_any_light(
    light: str, degrees: dict[str, Tensor]
) -> None:
    slow, fast = degrees[light].tolist()
    # The fastest pixels count, and among equally fast ones these are those with the largest error.
    assert fast == pytest.approx(100 * 3 / (160 * 2**0.5), rel=0.2)
    assert slow / fast == pytest.approx(0.5, abs=0.05)
