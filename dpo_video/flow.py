"""Dense optical flow: windowed, pyramidal, iterative Lucas-Kanade over many frame pairs at once.

A flow is in pixels, `x` then `y`, and belongs to the pixels of the frame it starts from: pixel `x`
of `first` is found again at `x + flow(x)` in `second`. To predict a frame from the one before it,
start the flow at the frame that is predicted: `warp(before, dense_flow(after, before))`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from kornia.filters import gaussian_blur2d
from kornia.geometry import remap
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
    per_chunk = max(1, CHUNK // (first.shape[-1] * first.shape[-2]))
    if start is None:
        start = first.new_zeros(len(first), 2, *first.shape[-2:])
    chunks = zip(
        first.split(per_chunk), second.split(per_chunk), start.split(per_chunk), strict=True
    )
    return torch.cat([_coarse_to_fine(a, b, guess, window, finest) for a, b, guess in chunks])


def warp(frames: Float[Tensor, "n c H W"], flow: Flow) -> Frames:
    """Sample `frames` at `x + flow(x)`, bilinearly; the border continues outwards."""
    height, width = frames.shape[-2:]
    y = torch.arange(height, dtype=flow.dtype, device=flow.device)[:, None]
    x = torch.arange(width, dtype=flow.dtype, device=flow.device)
    return remap(frames, x + flow[:, 0], y + flow[:, 1], padding_mode="border", align_corners=True)


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


def _coarse_to_fine(first: Frames, second: Frames, start: Flow, window: float, finest: int) -> Flow:
    height, width = first.shape[-2:]
    levels = max(1, int(math.log2(min(height, width) / COARSEST)) + 1)
    finest = min(finest, levels - 1)
    # Whole multiples, so that every pixel of a level is exactly four of the next.
    multiple = 2**levels
    pad = (0, -width % multiple, 0, -height % multiple)
    pyramid = [(F.pad(first, pad, mode="replicate"), F.pad(second, pad, mode="replicate"))]
    for _ in range(levels - 1):
        a, b = pyramid[-1]
        pyramid.append((_halve(_blur(a, 1.0)), _halve(_blur(b, 1.0))))
    flow = F.avg_pool2d(F.pad(start, pad, mode="replicate"), multiple) / 2 ** (levels - 1)
    for level in range(levels - 1, finest - 1, -1):
        if level < levels - 1:
            flow = 2 * _double(flow)
        flow = _refine(*pyramid[level], flow, window, final=level == finest)
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

    def windowed(values: Float[Tensor, "n k H W"]) -> Float[Tensor, "n k h w"]:
        return _blur(_halve(values), window / 2)

    def residual(flow: Float[Tensor, "n 2 h w"]) -> Frames:
        return warp(second, _double(flow)) - first

    dx, dy = _gradient(first)
    products = [dx * dx, dx * dy, dy * dy]
    xx, xy, yy = windowed(torch.stack([p.sum(1) for p in products], dim=1)).split(1, dim=1)
    energy = xx + yy
    pull = PULL * energy / 2 + NOISE
    xx, yy = xx + pull, yy + pull
    determinant = xx * yy - xy * xy
    # Weights of the neighbourhood's mean, by texture: they sum to less than one far from all
    # texture, so that the flow fades to 0 there.
    weight = energy / (_blur(energy, window / 2) + NOISE)
    start = flow
    for step in range(ITERATIONS[final]):
        error = residual(flow)
        if step == 0 and not final:
            before = windowed(error.square().sum(1, keepdim=True))
        right = windowed(torch.stack([(dx * error).sum(1), (dy * error).sum(1)], dim=1))
        right = right + pull * (flow - _blur(flow * weight, window / 2))
        x, y = right.split(1, dim=1)
        change = torch.cat([yy * x - xy * y, xx * y - xy * x], dim=1) / determinant
        flow = flow - change.clamp(-LARGEST_STEP, LARGEST_STEP)
    if final:
        return flow
    # On a coarse level a wrong match can lead the finer ones out of their reach: keep the change
    # only where it paid.
    after = windowed(residual(flow).square().sum(1, keepdim=True))
    return torch.where(after <= GAIN * before, flow, start)


def _gradient(frames: Frames) -> tuple[Frames, Frames]:
    # Central differences. Kornia's spatial_gradient is a padded 3-D convolution, twenty times
    # slower on a CPU, for the same numbers.
    padded = F.pad(frames, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return dx / 2, dy / 2


def _blur(values: Frames, sigma: float) -> Frames:
    taps = 2 * round(2 * sigma) + 1
    return gaussian_blur2d(values, (taps, taps), (sigma, sigma), border_type="replicate")


def _halve(values: Frames) -> Float[Tensor, "n c h w"]:
    return F.avg_pool2d(values, 2)


def _double(values: Float[Tensor, "n c h w"]) -> Frames:
    return F.interpolate(values, scale_factor=2, mode="bilinear", align_corners=False)
