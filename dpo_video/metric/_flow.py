"""Dense optical flow: windowed, pyramidal, iterative Lucas-Kanade over many frame pairs at once.

A flow is in pixels, `x` then `y`, and belongs to the pixels of the frame it starts from: pixel `x`
of `first` is found again at `x + flow(x)` in `second`. To predict a frame from the one before it,
start the flow at the frame that is predicted: `warp(before, dense_flow(after, before))`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from kornia.filters import get_gaussian_kernel1d
from torch import Tensor

Frames = Float[Tensor, "n c H W"]
Flow = Float[Tensor, "n 2 H W"]

COARSEST = 12  # pixels: the pyramid ends before its shorter side would fall below this
ITERATIONS = (3, 2)  # on the coarser levels, on the finest
LARGEST_STEP = 2.0  # pixels of a level that one iteration may move: beyond, linearisation is void
NOISE = 3e-5  # squared pixel value per pixel: gradient energy below it says nothing about motion
PULL = 0.05  # weight of the neighbourhood's flow, as a share of the window's gradient energy
GAIN = 0.8  # a level must bring the window's squared residual below this share to be believed
CHUNK = 1 << 18  # pixels worked on at once: what fits in a CPU's cache runs twice as fast
GROUP = 1 << 24  # pixels of the frames whose pyramids are held at once


@torch.no_grad()
def dense_flow(
    first: Frames,
    second: Frames,
    *,
    start: Flow | None = None,
    window: float = 2.5,
    finest: int = 0,
) -> Flow:
    """Where each pixel of `first` is in `second`.

    Lucas & Kanade 1981, coarse to fine and iterated in the inverse compositional form, in which
    `first`'s gradients serve all iterations (Bouguet 2001; Baker & Matthews 2004); the colour
    channels are summed in the least squares, since a shape may have its background's luminance.
    A window without texture follows its neighbourhood, and far from all texture the flow is 0.

    Args:
        first: frames in [0, 1].
        second: frames in [0, 1], one for each of `first`.
        start: a first guess, in pixels; 0 by default.
        window: standard deviation of the Gaussian window, in pixels of a pyramid level.
        finest: the pyramid level to stop at: 1 is half the resolution, four times quicker and
            less disturbed by noise, with the flow still in full-resolution pixels.

    Returns:
        The flow from `first` to `second`, in pixels.
    """
    if start is None:
        start = first.new_zeros(len(first), 2, *first.shape[-2:])
    groups = _groups(GROUP, first, second, start)
    return torch.cat([_coarse_to_fine(a, b, guess, window, finest) for a, b, guess in groups])


def warp(frames: Float[Tensor, "n c H W"], flow: Flow) -> Frames:
    """Sample `frames` at `x + flow(x)`, bilinearly; the border continues outwards."""
    height, width = frames.shape[-2:]
    # grid_sample's coordinates: -1 and 1 are the centres of the outermost pixels.
    right, down = 2 / max(1, width - 1), 2 / max(1, height - 1)
    x = torch.arange(width, dtype=flow.dtype, device=flow.device) * right - 1
    y = torch.arange(height, dtype=flow.dtype, device=flow.device)[:, None] * down - 1
    grid = flow.new_empty(len(flow), height, width, 2)
    grid[..., 0] = torch.add(x, flow[:, 0], alpha=right)
    grid[..., 1] = torch.add(y, flow[:, 1], alpha=down)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=True)


def visible(flow: Flow, back: Flow) -> Bool[Tensor, "n 1 H W"]:
    """Whether a pixel of the flow's start can be seen in the frame it leads to.

    Forward and backward flow must cancel: `|u + v|^2 < 0.01 (|u|^2 + |v|^2) + 0.5`, with `v` the
    flow back, at the place that `u` leads to (Sundaram et al. 2010, Eq. 5; the same constants as
    Lai et al. 2018). Pixels that come from outside the picture are not visible either.

    Args:
        flow: from the frames in question to the others.
        back: from the others to the frames in question.
    """
    height, width = flow.shape[-2:]
    returned = warp(back, flow)
    tolerance = 0.01 * (flow.square() + returned.square()).sum(1, keepdim=True) + 0.5
    consistent = (flow + returned).square().sum(1, keepdim=True) < tolerance
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    inside = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    return consistent & inside[:, None]


def _groups(pixels: int, *values: Tensor) -> list[tuple[Tensor, ...]]:
    """Split along `n`, so that a part has about so many pixels of the first's size."""
    height, width = values[0].shape[-2:]
    parts = [value.split(max(1, pixels // (height * width))) for value in values]
    return list(zip(*parts, strict=True))


def _chunks(*values: Tensor) -> list[tuple[Tensor, ...]]:
    """What is worked on at once: all of it on a GPU."""
    return _groups(CHUNK, *values) if values[0].device.type == "cpu" else [values]


def _coarse_to_fine(first: Frames, second: Frames, start: Flow, window: float, finest: int) -> Flow:
    height, width = first.shape[-2:]
    levels = max(1, int(math.log2(min(height, width) / COARSEST)) + 1)
    finest = min(finest, levels - 1)
    # Whole multiples, so that every pixel of a level is exactly four of the next.
    multiple = 2**levels
    pad = (0, -width % multiple, 0, -height % multiple)
    first, second, start = (F.pad(x, pad, mode="replicate") for x in (first, second, start))
    pyramid = [(first, second)]
    for _ in range(levels - 1):
        first, second = (
            torch.cat([_halve(_blur(part, 1.0)) for (part,) in _chunks(frames)])
            for frames in pyramid[-1]
        )
        pyramid.append((first, second))
    flow = F.avg_pool2d(start, multiple) / 2 ** (levels - 1)
    for level in range(levels - 1, finest - 1, -1):
        if level < levels - 1:
            flow = 2 * _double(flow)
        flow = torch.cat([
            _refine(a, b, guess, window, final=level == finest)
            for a, b, guess in _chunks(*pyramid[level], flow)
        ])  # fmt: skip
    for _ in range(finest):
        flow = 2 * _double(flow)
    return _double(flow)[..., :height, :width]


def _refine(
    first: Frames, second: Frames, flow: Float[Tensor, "n 2 h w"], window: float, *, final: bool
) -> Float[Tensor, "n 2 h w"]:
    """Iterate Lucas-Kanade on one level.

    The flow lives on every second pixel: the window makes it smooth, and all that is not a sum over
    pixels costs a quarter.
    """

    def windowed(*products: Float[Tensor, "n H W"]) -> Float[Tensor, "n k h w"]:
        return _blur(torch.stack([_halve(product) for product in products], dim=1), window / 2)

    def residual(flow: Float[Tensor, "n 2 h w"]) -> Frames:
        return warp(second, _double(flow)).sub_(first)

    dx, dy = _gradient(first)
    xx, xy, yy = windowed(_dot(dx, dx), _dot(dx, dy), _dot(dy, dy)).split(1, dim=1)
    energy = xx + yy
    pull = PULL * energy / 2 + NOISE
    xx, yy = xx + pull, yy + pull
    determinant = xx * yy - xy * xy
    xx, xy, yy = xx / determinant, xy / determinant, yy / determinant
    # Weights of the neighbourhood's mean, by texture: they sum to less than one far from all
    # texture, so that the flow fades to 0 there.
    weight = energy / (_blur(energy, window / 2) + NOISE)
    start = flow
    for step in range(ITERATIONS[final]):
        error = residual(flow)
        if step == 0 and not final:
            before = windowed(_dot(error, error))
        right = windowed(_dot(dx, error), _dot(dy, error))
        right += pull * (flow - _blur(flow * weight, window / 2))
        x, y = right.split(1, dim=1)
        change = torch.cat([yy * x - xy * y, xx * y - xy * x], dim=1)
        flow = flow - change.clamp_(-LARGEST_STEP, LARGEST_STEP)
    if final:
        return flow
    # On a coarse level a wrong match can lead the finer ones out of their reach: keep the change
    # only where it paid.
    error = residual(flow)
    return torch.where(windowed(_dot(error, error)) <= GAIN * before, flow, start)


# --- filters ---------------------------------------------------------------------------------
# Sums of shifted planes: on a CPU, convolutions, poolings and interpolations of few channels, and
# Kornia's filters, which are made of them, take two to twenty times as long for the same numbers.


def _dot(first: Frames, second: Frames) -> Float[Tensor, "n H W"]:
    """Summed over the channels."""
    total = first[:, 0] * second[:, 0]
    for channel in range(1, first.shape[1]):
        total.addcmul_(first[:, channel], second[:, channel])
    return total


def _gradient(frames: Frames) -> tuple[Frames, Frames]:
    """Central differences."""
    padded = F.pad(frames, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return dx.mul_(0.5), dy.mul_(0.5)


def _blur(values: Frames, sigma: float) -> Frames:
    """By a Gaussian; the border continues outwards."""
    taps = _taps(sigma)
    reach = len(taps) // 2
    for dim, pad in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):
        size, padded = values.shape[dim], F.pad(values, pad, mode="replicate")
        values = padded.narrow(dim, reach, size) * taps[reach]
        for k in range(reach):
            both = padded.narrow(dim, k, size) + padded.narrow(dim, 2 * reach - k, size)
            values.add_(both, alpha=taps[k])
    return values


@lru_cache(maxsize=8)
def _taps(sigma: float) -> tuple[float, ...]:
    return tuple(get_gaussian_kernel1d(2 * round(2 * sigma) + 1, sigma)[0].tolist())


def _halve(values: Float[Tensor, "*n H W"]) -> Float[Tensor, "*n h w"]:
    """The mean of every four pixels."""
    rows = values[..., ::2, :] + values[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)


def _double(values: Float[Tensor, "n c h w"]) -> Frames:
    """Bilinear, pixels as areas: F.interpolate without align_corners."""
    for dim, pad in ((2, (0, 0, 1, 1)), (3, (1, 1, 0, 0))):
        size, padded = values.shape[dim], F.pad(values, pad, mode="replicate")
        near = 0.75 * values
        values = values.new_empty([*values.shape[: dim + 1], 2, *values.shape[dim + 1 :]])
        for half, start in ((0, 0), (1, 2)):
            far = padded.narrow(dim, start, size)
            torch.add(near, far, alpha=0.25, out=values.select(dim + 1, half))
        values = values.flatten(dim, dim + 1)
    return values
