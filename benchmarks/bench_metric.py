"""The optical flow behind `warp_error`, beside OpenCV's on the same frames.

The clip is a texture that drifts, turns and grows, drawn for every frame from the original, so that
the true flow is known. OpenCV works on 8-bit gray frames, as it must; ours on colour in fp32, as
`warp_error` calls it, and on gray. Its pyramidal Lucas-Kanade is for points: it is given those that
ours solves for, every second pixel each way.
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
from conftest import Turn, needs
from kornia.filters import gaussian_blur2d
from torch import Tensor

from dpo_video.flow import dense_flow
from dpo_video.metric.warp_error import WarpError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
MARGIN = 24  # pixels: what enters or leaves the picture has no ground truth


@cache
def clip(frames: int, size: int) -> tuple[Tensor, Tensor]:
    """Frames `[F 3 H W]`, and the true flow from each to the next `[F-1 2 H W]`."""
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) - 0.5
    layers = [s * gaussian_blur2d(noise, (t, t), (s, s)) for s, t in ((1.5, 7), (4, 17), (10, 41))]
    texture = (0.5 + 0.8 * torch.stack(layers).sum(0)).clamp(0, 1)
    axis = torch.arange(size) - (size - 1) / 2
    here = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))

    def motion(t: int) -> tuple[Tensor, Tensor]:
        """A point of frame 0 to frame t: matrix and shift."""
        angle, scale = 0.008 * t, 1.004**t
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        return torch.tensor([[cos, -sin], [sin, cos]]), torch.tensor([1.3 * t, -0.7 * t])

    drawn, flows = [], []
    for t in range(frames):
        matrix, shift = motion(t)
        origin = torch.einsum("ij,jhw->ihw", matrix.inverse(), here - shift[:, None, None])
        grid = (2 * origin / (size - 1)).permute(1, 2, 0)[None]
        sampled = F.grid_sample(texture, grid, "bicubic", "reflection", align_corners=True)
        drawn.append(sampled[0].clamp(0, 1))
        if t + 1 < frames:
            matrix, shift = motion(t + 1)
            flows.append(torch.einsum("ij,jhw->ihw", matrix, origin) + shift[:, None, None] - here)
    return torch.stack(drawn), torch.stack(flows)


@cache
def gray(frames: int, size: int) -> Tensor:
    return torch.einsum("fchw,c->fhw", clip(frames, size)[0], torch.tensor(LUMA))[:, None]


@cache
def gray_bytes(frames: int, size: int) -> np.ndarray:
    return (255 * gray(frames, size)[:, 0]).round().byte().numpy()


def colour_flow(frames: int, size: int) -> Tensor:
    video = clip(frames, size)[0]
    return dense_flow(video[:-1], video[1:])


def gray_flow(frames: int, size: int) -> Tensor:
    video = gray(frames, size)
    return dense_flow(video[:-1], video[1:])


def opencv(solve: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[int, int], Tensor]:
    def flow(frames: int, size: int) -> Tensor:
        video = gray_bytes(frames, size)
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


FLOWS: dict[str, Callable[[int, int], Tensor]] = {
    "ours, colour": colour_flow,
    "ours, gray": gray_flow,
    "OpenCV Farneback": opencv(farneback),
    "OpenCV DIS, medium": opencv(dis),
    "OpenCV pyramidal LK": opencv(pyramidal_lk),
}


def clip_size(quick: bool) -> tuple[int, int]:
    return (3, 96) if quick else (16, 512)


@cache
def accuracy(contestant: str, frames: int, size: int) -> dict[str, float]:
    """How far the flow is from the true one, where the picture does not end."""
    inner = (..., slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))
    error = (FLOWS[contestant](frames, size) - clip(frames, size)[1]).norm(dim=1)[inner]
    return {
        "mean endpoint error, px": error.mean().item(),
        "99% below, px": float(np.quantile(error.numpy(), 0.99)),
    }


@pytest.mark.contestants(*FLOWS)
def test_flow(turn: Turn, contestant: str, quick: bool) -> None:
    frames, size = clip_size(quick)
    race = f"optical flow, {frames} frames of {size}x{size}"
    if contestant.startswith("OpenCV"):
        needs(race, contestant, "cv2", "metric")
    turn(
        race,
        lambda: FLOWS[contestant](frames, size),
        unit="frame pair",
        work=frames - 1,
        yardstick="OpenCV Farneback",
        figures=accuracy(contestant, frames, size),
    )


VARIANTS = ("corrected", "lk", "farneback")


@pytest.mark.contestants(*VARIANTS)
def test_warp_error(turn: Turn, contestant: Any, quick: bool) -> None:
    """The whole metric: flow both ways, occlusion, warp; the published variants have one way."""
    frames, size = clip_size(quick)
    race = f"warp_error, {frames} frames of {size}x{size}"
    if contestant == "farneback":
        needs(race, contestant, "cv2", "metric")
    video = clip(frames, size)[0].movedim(0, 1)[None]
    metric = WarpError(variant=contestant)
    turn(
        race, lambda: metric(video, [""]), unit="frame pair", work=frames - 1,
        yardstick="farneback",
    )  # fmt: skip
