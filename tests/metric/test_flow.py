"""The optical flow on motions with known ground truth, and against OpenCV on real clips."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from jaxtyping import Float
from kornia.filters import gaussian_blur2d
from kornia.geometry import remap, resize
from torch import Tensor

from dpo_video.data.video import read_video
from dpo_video.metric._flow import _double, blur, dense_flow, halve, visible, warp

CLIPS = Path(__file__).parents[1] / "clips"
MARGIN = 20  # pixels at the border, whose content enters or leaves the picture
Motion = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def texture(size: int = 160, seed: int = 0) -> Float[Tensor, "1 3 size size"]:
    """Noise with structure at several scales, as in photographs."""
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 0.5
    scales = ((1.5, 7), (4.0, 17), (10.0, 41))  # sigma, taps
    layers = [s * gaussian_blur2d(noise, (taps, taps), (s, s)) for s, taps in scales]
    return (0.5 + 0.8 * torch.stack(layers).sum(0)).clamp(0, 1)


def field(motion: Motion, size: int = 160) -> Float[Tensor, "1 2 size size"]:
    """Flow field of a motion given as a displacement of centred coordinates."""
    axis = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack(motion(x, y))[None]


def shift(dx: float, dy: float) -> Motion:
    return lambda x, y: (torch.full_like(x, dx), torch.full_like(y, dy))


def turn(angle: float) -> Motion:
    cos, sin = math.cos(angle), math.sin(angle)
    return lambda x, y: (cos * x - sin * y - x, sin * x + cos * y - y)


def zoom(scale: float) -> Motion:
    return lambda x, y: ((scale - 1) * x, (scale - 1) * y)


def endpoint_error(flow: Tensor, truth: Tensor) -> Tensor:
    return (flow - truth).norm(dim=1)[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


@pytest.mark.parametrize(
    ("motion", "inverse"),
    [
        (shift(0.24, 0.18), shift(-0.24, -0.18)),
        (shift(-0.4, 0.3), shift(0.4, -0.3)),
        (shift(1.8, -1.4), shift(-1.8, 1.4)),
        (shift(5.6, 4.2), shift(-5.6, -4.2)),
        (turn(0.03), turn(-0.03)),
        (turn(-0.1), turn(0.1)),
        (zoom(1.03), zoom(1 / 1.03)),
        (zoom(0.92), zoom(1 / 0.92)),
    ],
    ids=["0.3px", "0.5px", "2.3px", "7px", "1.7deg", "-5.7deg", "+3%", "-8%"],
)
def test_known_motions_are_found_to_a_tenth_of_a_pixel(motion: Motion, inverse: Motion) -> None:
    first = texture()
    error = endpoint_error(dense_flow(first, warp(first, field(inverse))), field(motion))
    assert error.mean() < 0.06
    assert error.quantile(0.99) < 0.25


def test_warp_samples_at_x_plus_flow() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 6, 8)
    moved = warp(ramp, torch.tensor([0.5, 0.0]).view(1, 2, 1, 1).expand(1, 2, 6, 8))
    assert torch.allclose(moved[..., :-1], ramp[..., :-1] + 0.5, atol=1e-5)
    assert torch.allclose(moved[..., -1], ramp[..., -1])  # replicated border


def test_a_frame_warped_along_the_flow_back_predicts_the_next() -> None:
    before = texture()
    after = warp(before, field(shift(-1.0, 0.0)))  # everything goes one pixel to the right
    inner = (..., slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))
    unwarped = (before - after)[inner].square().mean()
    back = dense_flow(after, before)
    assert (warp(before, back) - after)[inner].square().mean() < 0.01 * unwarped
    wrong = warp(before, dense_flow(before, after))
    assert (wrong - after)[inner].square().mean() > 2 * unwarped


def test_shape_with_the_luminance_of_its_background_is_tracked() -> None:
    luma = torch.tensor([0.299, 0.587, 0.114])
    green, gray = torch.tensor([0.15, 0.66, 0.27]), torch.tensor(0.4631)
    assert abs(float(green @ luma - gray)) < 1e-3
    frames = gray.expand(2, 3, 64, 64).clone()
    frames[0, :, 20:40, 20:40] = green[:, None, None]
    frames[1, :, 20:40, 22:42] = green[:, None, None]
    flow = dense_flow(frames[:1], frames[1:])[0]
    for edge in (20, 38):
        seen = flow[:, 24:36, edge : edge + 2].mean(dim=(1, 2))
        assert torch.allclose(seen, torch.tensor([2.0, 0.0]), atol=0.3)


def test_no_texture_no_flow() -> None:
    plain = torch.full((1, 3, 64, 64), 0.3)
    assert dense_flow(plain, plain).abs().max() == 0
    assert dense_flow(plain, plain + 0.2).abs().max() == 0
    grain = 1e-3 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert dense_flow(plain + grain[:1], plain + grain[1:]).abs().max() < 0.2
    # The background far from a moving shape has no flow.
    first, second = plain.clone(), plain.clone()
    first[..., 4:14, 4:14], second[..., 4:14, 6:16] = 0.9, 0.9
    assert dense_flow(first, second)[..., 40:, 40:].abs().max() < 0.01


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 6, 10), (3, 2, 34, 16)])
def test_filters_equal_kornias(shape: tuple[int, ...]) -> None:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    height, width = shape[2:]
    assert torch.allclose(
        halve(values), resize(values, (height // 2, width // 2), "area"), atol=1e-6
    )
    assert torch.allclose(_double(values), resize(values, (2 * height, 2 * width)), atol=1e-6)
    for sigma, taps in ((1.0, 5), (1.25, 5), (2.5, 11)):
        blurred = gaussian_blur2d(values, (taps, taps), (sigma, sigma), border_type="replicate")
        assert torch.allclose(blur(values, sigma), blurred, atol=1e-6)
    flow = 3 * torch.rand(shape[0], 2, *shape[2:], generator=torch.Generator().manual_seed(1))
    y, x = torch.meshgrid(*(torch.arange(float(n)) for n in shape[2:]), indexing="ij")
    sampled = remap(
        values, x + flow[:, 0], y + flow[:, 1], padding_mode="border", align_corners=True
    )
    assert torch.allclose(warp(values, flow), sampled, atol=1e-5)


def test_batch_equals_single_pairs() -> None:
    first = torch.cat([texture(seed=seed) for seed in range(12)])  # more than one chunk
    second = torch.cat([warp(frame[None], field(turn(0.02))) for frame in first])
    together = dense_flow(first, second)
    alone = torch.cat([dense_flow(a[None], b[None]) for a, b in zip(first, second, strict=True)])
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (37, 53), (9, 30), (2, 2)])
def test_any_size(size: tuple[int, int]) -> None:
    frames = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    for finest in (0, 1, 9):
        flow = dense_flow(frames[:1], frames[1:], finest=finest)
        assert flow.shape == (1, 2, *size)
        assert flow.isfinite().all()


def test_flow_at_half_resolution_is_in_full_resolution_pixels() -> None:
    first = texture()
    truth = field(shift(1.8, -1.4))
    second = warp(first, -truth)
    assert endpoint_error(dense_flow(first, second, finest=1), truth).mean() < 0.06


def test_initial_flow_finds_motion_out_of_reach() -> None:
    noise = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    first = gaussian_blur2d(noise, (7, 7), (1.5, 1.5))  # no coarse structure
    truth = field(shift(44.0, 0.0), 256)
    second = warp(first, -truth)
    inner = (..., slice(80, -80), slice(80, -80))
    blind = (dense_flow(first, second) - truth)[inner].norm(dim=1).mean()
    guided = (dense_flow(first, second, start=0.93 * truth) - truth)[inner].norm(dim=1).mean()
    assert blind > 1
    assert guided < 0.2


def test_uncovered_pixels_are_masked() -> None:
    ground, patch = texture(96), texture(96, seed=1)
    before, after = ground.clone(), ground.clone()
    before[..., 32:64, 30:62] = patch[..., 32:64, 30:62]
    after[..., 32:64, 40:72] = patch[..., 32:64, 30:62]  # ten pixels to the right
    shown = visible(dense_flow(after, before), dense_flow(before, after))[0, 0].float()
    assert shown[36:60, 31:39].mean() < 0.35  # uncovered ground
    assert shown[36:60, 44:68].mean() > 0.85  # the patch
    assert shown[8:24, 8:-8].mean() > 0.99  # ground that is never covered


def test_pixels_from_outside_the_picture_are_masked() -> None:
    flow = torch.full((1, 2, 8, 8), 0.0)
    flow[:, 0] = 2.0
    shown = visible(flow, -flow)[0, 0]
    assert shown[:, :6].all()
    assert not shown[:, 6:].any()


def opencv_flow(method: str, first: Tensor, second: Tensor) -> Tensor:
    flows = []
    for pair in zip(first, second, strict=True):
        a, b = (
            cv2.cvtColor((255 * f).round().byte().permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY)
            for f in pair
        )
        if method == "dis":
            solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
            flows.append(solver.calc(a, b, None))
        else:
            flows.append(cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 5, 15, 3, 5, 1.2, 0))
    return torch.from_numpy(np.stack(flows)).movedim(-1, 1)


@pytest.mark.parametrize(("name", "start"), [("grand_prix_1906", 0), ("sitting_down", 2)])
def test_as_good_as_opencv_on_real_clips(name: str, start: float) -> None:
    footage = read_video(CLIPS / f"{name}.mp4", start=start, frames=9)
    frames = footage.frames.movedim(1, 0) / 255
    before, after = frames[:-1], frames[1:]

    def residual(flow: Tensor) -> float:
        return float((warp(before, flow) - after).square().mean())

    ours = dense_flow(after, before)
    dis, farneback = (opencv_flow(method, after, before) for method in ("dis", "farneback"))
    unwarped = residual(torch.zeros_like(ours))
    assert residual(ours) < 1.25 * residual(dis)
    assert residual(ours) < residual(farneback)
    assert residual(ours) < 0.35 * unwarped
    # The two agree where there is texture; the film grain of 1906 gives DIS spurious steps.
    assert (ours - dis).norm(dim=1).median() < (1.2 if name == "grand_prix_1906" else 0.25)
