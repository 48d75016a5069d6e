"""The optical flow behind `warp_error` and OpenCV's flows, on the same frames.

The clip is a texture that drifts, rotates and grows, rendered per frame from the original, so the
true flow is known. Accuracy depends on the window: a wide one averages noise away on smooth motion,
a narrow one resolves edges. A second clip, of a patch that moves over a background, is for accuracy
alone, and our flow also runs with a window as wide as Farneback's 15 pixels.

OpenCV's flows require 8-bit gray frames; ours runs on fp32 colour, as `warp_error` calls it, and on
gray. OpenCV's pyramidal Lucas-Kanade solves for points: the same grid that ours solves for, every
second pixel in each direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from kornia.geometry import resize
from torch import Tensor

from benchmarks.support.rounds import Measure, needs
from dpo_video.metric._flow import _double, blur, dense_flow, halve
from dpo_video.metric.warp_error import WarpError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
MARGIN = 24  # pixels: near the border, content enters or leaves and has no ground truth


def drawn_texture(size: int, seed: int) -> Tensor:
    """Noise with structure at several scales, as in natural images: `[1 3 H W]`."""
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 0.5
    layers = [s * gaussian_blur2d(noise, (t, t), (s, s)) for s, t in ((1.5, 7), (4, 17), (10, 41))]
    return (0.5 + 0.8 * torch.stack(layers).sum(0)).clamp(0, 1)


@cache
def clip(frames: int, size: int, kind: str = "smooth") -> tuple[Tensor, Tensor]:
    """Frames `[F 3 H W]` and the true flow from each to the next, `[F-1 2 H W]`."""
    texture = drawn_texture(size, seed=0)
    if kind == "patch":
        return moving_patch(texture, drawn_texture(size, seed=1), frames)
    axis = torch.arange(size) - (size - 1) / 2
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))

    def motion(t: int) -> tuple[Tensor, Tensor]:
        """Affine map of a point from frame 0 to frame t: matrix and shift."""
        angle, scale = 0.008 * t, 1.004**t
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        return torch.tensor([[cos, -sin], [sin, cos]]), torch.tensor([1.3 * t, -0.7 * t])

    drawn, flows = [], []
    for t in range(frames):
        matrix, shift = motion(t)
        origin = torch.einsum("ij,jhw->ihw", matrix.inverse(), pixels - shift[:, None, None])
        grid = (2 * origin / (size - 1)).permute(1, 2, 0)[None]
        sampled = F.grid_sample(texture, grid, "bicubic", "reflection", align_corners=True)
        drawn.append(sampled[0].clamp(0, 1))
        if t + 1 < frames:
            matrix, shift = motion(t + 1)
            flows.append(
                torch.einsum("ij,jhw->ihw", matrix, origin) + shift[:, None, None] - pixels
            )
    return torch.stack(drawn), torch.stack(flows)


def moving_patch(background: Tensor, patch: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """A square of a quarter of the area, moving 2 pixels right and 1 down per frame."""
    size = background.shape[-1]
    drawn, flows = [], []
    for t in range(frames):
        top, left = size // 4 + t, size // 4 + 2 * t
        window = (..., slice(top, top + size // 2), slice(left, left + size // 2))
        frame, flow = background[0].clone(), torch.zeros(2, size, size)
        frame[window] = patch[0, :, : size // 2, : size // 2]
        flow[0][window], flow[1][window] = 2, 1
        drawn.append(frame)
        flows.append(flow)
    return torch.stack(drawn), torch.stack(flows[:-1])


@cache
def gray(frames: int, size: int, kind: str = "smooth") -> Tensor:
    return torch.einsum("fchw,c->fhw", clip(frames, size, kind)[0], torch.tensor(LUMA))[:, None]


@cache
def gray_bytes(frames: int, size: int, kind: str) -> np.ndarray:
    return (255 * gray(frames, size, kind)[:, 0]).round().byte().numpy()


def colour_flow(frames: int, size: int, kind: str = "smooth") -> Tensor:
    video = clip(frames, size, kind)[0]
    return dense_flow(video[:-1], video[1:])


def wide_flow(frames: int, size: int, kind: str = "smooth") -> Tensor:
    video = clip(frames, size, kind)[0]
    return dense_flow(video[:-1], video[1:], window=5.0)


def gray_flow(frames: int, size: int, kind: str = "smooth") -> Tensor:
    video = gray(frames, size, kind)
    return dense_flow(video[:-1], video[1:])


def opencv(solve: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., Tensor]:
    def flow(frames: int, size: int, kind: str = "smooth") -> Tensor:
        video = gray_bytes(frames, size, kind)
        flows = [solve(a, b) for a, b in pairwise(video)]
        return torch.from_numpy(np.stack(flows)).movedim(-1, 1)

    return flow


def farneback(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    import cv2

    # Video-DPO's settings.
    return cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 3, 15, 3, 5, 1.2, 0)


def dis(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    import cv2

    solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return solver.calc(first, second, None)


def pyramidal_lk(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    import cv2

    height, width = first.shape
    x, y = np.meshgrid(np.arange(0.5, width, 2), np.arange(0.5, height, 2))
    points = np.stack([x, y], axis=-1).reshape(-1, 1, 2).astype(np.float32)
    levels = int(math.log2(min(height, width) / 12))
    found, _, _ = cv2.calcOpticalFlowPyrLK(
        first, second, points, None, winSize=(11, 11), maxLevel=levels
    )
    coarse = (found - points).reshape(height // 2, width // 2, 2)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


FLOWS: dict[str, Callable[..., Tensor]] = {
    "ours, colour": colour_flow,
    "ours, colour, wide window": wide_flow,
    "ours, gray": gray_flow,
    "OpenCV Farneback": opencv(farneback),
    "OpenCV DIS, medium": opencv(dis),
    "OpenCV pyramidal LK": opencv(pyramidal_lk),
}


def clip_size(quick: bool) -> tuple[int, int]:
    return (3, 96) if quick else (16, 512)


@cache
def accuracy(candidate: str, frames: int, size: int) -> dict[str, float]:
    """Mean distance to the true flow in pixels, away from the border."""
    inner = (..., slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))

    def error(kind: str) -> Tensor:
        difference = FLOWS[candidate](frames, size, kind) - clip(frames, size, kind)[1]
        return difference.norm(dim=1)[inner]

    # Near the edge of the patch: where the true flow changes within 8 pixels.
    truth = clip(frames, size, "patch")[1][:, :1]
    near = (F.max_pool2d(truth, 17, 1, 8) + F.max_pool2d(-truth, 17, 1, 8))[:, 0] > 0
    patch = error("patch")
    return {
        "error on smooth motion, px": error("smooth").mean().item(),
        "on a moving patch, px": patch.mean().item(),
        "within 8 px of its edge, px": patch[near[inner]].mean().item(),
    }


@pytest.mark.candidates(*FLOWS)
def test_flow(measure: Measure, candidate: str, quick: bool) -> None:
    frames, size = clip_size(quick)
    group = f"optical flow, {frames} frames of {size}x{size}"
    if candidate.startswith("OpenCV"):
        needs(group, candidate, "cv2", "metric")
    measure(
        group,
        lambda: FLOWS[candidate](frames, size),
        unit="frame pair",
        work=frames - 1,
        baseline="OpenCV Farneback",
        figures=accuracy(candidate, frames, size),
    )


@pytest.mark.candidates("lucas_kanade", "dis", "videodpo_lk", "videodpo_farneback")
def test_warp_error(measure: Measure, candidate: Any, quick: bool) -> None:
    """The complete metric: flows in both directions, occlusion and warp; variants use one flow."""
    frames, size = clip_size(quick)
    group = f"warp_error, {frames} frames of {size}x{size}"
    if candidate in ("dis", "videodpo_farneback"):
        needs(group, candidate, "cv2", "metric")
    video = clip(frames, size)[0].movedim(0, 1)[None]
    metric = WarpError(flow=candidate)
    measure(
        group, lambda: metric(video, [""]), unit="frame pair", work=frames - 1,
        baseline="videodpo_farneback",
    )  # fmt: skip


def kornia_blur(values: Tensor) -> Tensor:
    taps = 2 * round(2 * SIGMA) + 1
    return gaussian_blur2d(values, (taps, taps), (SIGMA, SIGMA), border_type="replicate")


def kornia_resize(values: Tensor, factor: float, interpolation: str) -> Tensor:
    height, width = values.shape[-2:]
    return resize(values, (int(factor * height), int(factor * width)), interpolation)


SIGMA = 1.25
FILTERS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "Gaussian blur": {"ours": lambda values: blur(values, SIGMA), "Kornia": kornia_blur},
    "half the size": {"ours": halve, "Kornia": lambda values: kornia_resize(values, 0.5, "area")},
    "twice the size": {
        "ours": _double, "Kornia": lambda values: kornia_resize(values, 2, "bilinear"),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.candidates("ours", "Kornia")
def test_filter(measure: Measure, candidate: str, name: str, quick: bool) -> None:
    """The flow's filters that are written out for CPUs; on a GPU it uses Kornia's."""
    size = 96 if quick else 512
    frames = torch.rand(1, 3, size, size)
    measure(
        f"{name}, 3 channels of {size}x{size}", lambda: FILTERS[name][candidate](frames),
        unit="frame", baseline="Kornia", calls=5,
    )  # fmt: skip
