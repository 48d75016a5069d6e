"""Dense optical flow: windowed, pyramidal, iterative Lucas-Kanade over many frame pairs at once.

A flow is in pixels, `x` then `y`, on the grid of the frame it starts from: pixel `x` of `first`
appears at `x + flow(x)` in `second`. Predicting a frame from the previous one needs the flow from
the predicted frame back: `warp(before, dense_flow(after, before))`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from kornia.filters import gaussian_blur2d, get_gaussian_kernel1d, spatial_gradient3d
from kornia.geometry import remap, resize
from torch import Tensor

Frames = Float[Tensor, "n c H W"]
Flow = Float[Tensor, "n 2 H W"]

LIGHT = 0.1  # of the shorter side: standard deviation of the windows whose light is taken out
DARK = 0.2  # of white, added before the logarithm: what is darker is mostly noise
FAINT = 0.1  # contrast of the logarithm below which noise dominates
CONTRAST = 0.4  # standard deviation of evenly lit frames
COARSEST = 12  # pixels: least shorter side of the coarsest pyramid level
ITERATIONS = (3, 2)  # on the coarser levels and on the finest
LARGEST_STEP = 2.0  # pixels of a level per iteration: the linearisation does not hold beyond it
NOISE = 4e-6  # squared pixel value per pixel: gradient energy at which noise dominates
PULL = 0.1  # weight of the neighbouring flow, as a share of the window's gradient energy
GAIN = 0.8  # another flow is preferred where it lowers the squared residual to this share
TIE = 1e-5  # squared pixel value: smaller differences between residuals are noise
DISTANCES = (6, 3)  # pixels: a flow can be replaced by that of a pixel so far away
CHUNK = 1 << 18  # pixels per chunk on a CPU: twice as fast when a chunk fits in its cache
GROUP = 1 << 24  # pixels of the frames whose pyramids are in memory together


@torch.no_grad()
def dense_flow(
    first: Frames,
    second: Frames,
    *,
    start: Flow | None = None,
    window: float = 2.5,
    finest: int = 0,
    levels: int | None = None,
) -> Flow:
    """Optical flow from `first` to `second`, insensitive to changes of light.

    Lucas & Kanade 1981, coarse to fine and iterated in the inverse compositional form, in which
    `first`'s gradients serve all iterations (Bouguet 2001; Baker & Matthews 2004). The least
    squares sum over the channels, since a shape can have the same luminance as its background.

    - Light: a plane is fitted to every window of gradients and residuals, per channel, and
      subtracted, so that a light that changes evenly over a window moves nothing. Frames through
      `even_light` are needed where light changes within a window.
    - Motion boundaries and large motions: the flow passes a median filter after every iteration
      (Sun et al. 2010), and takes over the flow of pixels nearby where that fits much better
      (Barnes et al. 2009; DIS, Kroeger et al. 2016, propagates along patches alike).
    - A window without texture takes its neighbours' flow; far from all texture the flow is 0.

    Args:
        first: frames in [0, 1].
        second: frames in [0, 1], one for each of `first`.
        start: initial flow, in pixels; 0 by default.
        window: standard deviation of the Gaussian window, in pixels of a pyramid level.
        levels: pyramid levels to start at: fewer than the picture allows where `start` is close.
        finest: pyramid level to stop at. 1 is half the resolution: four times faster and less
            sensitive to noise; the flow stays in full-resolution pixels.

    Returns:
        The flow from `first` to `second`, in pixels.
    """
    if start is None:
        start = first.new_zeros(len(first), 2, *first.shape[-2:])
    groups = _groups(GROUP, first, second, start)
    return torch.cat(
        [_coarse_to_fine(a, b, guess, window, finest, levels) for a, b, guess in groups]
    )


def even_light(frames: Frames) -> Frames:
    """The contrast of every pixel to its surroundings, around 0.5: frames without their light.

    Light multiplies a picture, so it adds to the logarithm. A Gaussian window around each pixel (a
    tenth of the picture's shorter side) gives its mean, which is subtracted per channel, and the
    standard deviation over all channels, by which the rest is divided. Light that changes over more
    than the window then has no effect, and soft patches of a quarter of the picture have less than
    half of theirs. Values lie mostly within 0.5 +- 1.
    """
    sigma = LIGHT * min(frames.shape[-2:])
    logs = (frames + DARK).log_()
    logs -= _wide_blur(logs, sigma)
    spread = _wide_blur(logs.square().mean(1, keepdim=True), sigma).sqrt_()
    return logs.mul_(CONTRAST).div_(spread.add_(FAINT)).add_(0.5)


def _wide_blur(values: Frames, sigma: float) -> Frames:
    """Gaussian blur at the least resolution that a window of `sigma` pixels needs."""
    factor = max(1, int(sigma / 3))
    small = F.avg_pool2d(values, factor, ceil_mode=True, count_include_pad=False)
    wide = blur(small, sigma / factor)
    return F.interpolate(wide, size=values.shape[-2:], mode="bilinear")


def warp(frames: Float[Tensor, "n c H W"], flow: Flow) -> Frames:
    """Sample `frames` at `x + flow(x)`, bilinearly, with replicated borders."""
    height, width = frames.shape[-2:]
    # Coordinates of grid_sample: -1 and 1 are the centres of the outermost pixels. With those in
    # pixels, remap takes twice as long.
    right, down = 2 / max(1, width - 1), 2 / max(1, height - 1)
    x = torch.arange(width, dtype=flow.dtype, device=flow.device) * right - 1
    y = torch.arange(height, dtype=flow.dtype, device=flow.device)[:, None] * down - 1
    return remap(
        frames,
        torch.add(x, flow[:, 0], alpha=right),
        torch.add(y, flow[:, 1], alpha=down),
        padding_mode="border", align_corners=True, normalized_coordinates=True,
    )  # fmt: skip


def without_doubtful_motion(first: Frames, second: Frames, flow: Flow) -> Flow:
    """`flow` where it explains the change between the frames, and 0 elsewhere.

    Where a picture is flat, patches of changing light are the only texture, and a flow follows
    them. A motion counts where it lowers the variance of the difference, in a window of 2.5 pixels,
    to 70% of that without motion.
    """
    parts = [
        _best(a, b, torch.zeros_like(motion), [motion], sigma=2.5, gain=0.7)
        for a, b, motion in _chunks(first, second, flow)
    ]
    return torch.cat(parts)


def visible(flow: Flow, back: Flow) -> Bool[Tensor, "n 1 H W"]:
    """Mask of the pixels of the flow's first frame that the second frame shows too.

    Forward and backward flow must cancel: `|u + v|^2 < 0.01 (|u|^2 + |v|^2) + 0.25`, where `v` is
    the backward flow sampled at `x + u(x)` (Sundaram et al. 2010, Eq. 5, who add 0.5, which lets an
    error of 0.7 pixels pass). The eight neighbours of a pixel that fails are masked too: edges of
    the flow are off by a pixel. Pixels whose flow leaves the picture are masked.

    Args:
        flow: from the first frames to the second.
        back: from the second frames to the first.
    """
    height, width = flow.shape[-2:]
    returned = warp(back, flow)
    tolerance = 0.01 * (flow.square() + returned.square()).sum(1, keepdim=True) + 0.25
    differs = (flow + returned).square().sum(1, keepdim=True) >= tolerance
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    inside = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    return (F.max_pool2d(differs.to(flow), 3, stride=1, padding=1) == 0) & inside[:, None]


def _groups(pixels: int, *values: Tensor) -> list[tuple[Tensor, ...]]:
    """Split along `n` into parts of about `pixels` pixels, counted on the first tensor."""
    height, width = values[0].shape[-2:]
    parts = [value.split(max(1, pixels // (height * width))) for value in values]
    return list(zip(*parts, strict=True))


def _chunks(*values: Tensor) -> list[tuple[Tensor, ...]]:
    """Parts that fit in a CPU's cache; a single part on a GPU."""
    return _groups(CHUNK, *values) if values[0].device.type == "cpu" else [values]


def _coarse_to_fine(
    first: Frames, second: Frames, start: Flow, window: float, finest: int, most: int | None
) -> Flow:
    height, width = first.shape[-2:]
    levels = max(1, int(math.log2(min(height, width) / COARSEST)) + 1)
    levels = min(levels, most or levels)
    finest = min(finest, levels - 1)
    # Pad to a multiple, so that every pixel of a level is exactly four of the next finer one.
    multiple = 2**levels
    pad = (0, -width % multiple, 0, -height % multiple)
    first, second, start = (F.pad(x, pad, mode="replicate") for x in (first, second, start))
    pyramid = [(first, second)]
    for _ in range(levels):
        first, second = (
            torch.cat([halve(blur(part, 1.0)) for (part,) in _chunks(frames)])
            for frames in pyramid[-1]
        )
        pyramid.append((first, second))
    # The flow of a level is kept at the next coarser level's resolution and in its pixels: the
    # window makes it smooth, and everything but the sums over pixels costs a quarter.
    flow = F.avg_pool2d(start, multiple) / multiple
    for level in range(levels - 1, finest - 1, -1):
        flow = torch.cat([
            _refine(*parts, window=window, final=level == finest)
            for parts in _chunks(*pyramid[level], *pyramid[level + 1], flow)
        ])  # fmt: skip
        flow = 2 * _double(flow)
    flow = torch.cat([
        _best(a, b, guess, _neighbours(guess, DISTANCES[1:]), sigma=0.7, tie=1e-4)
        for a, b, guess in _chunks(*pyramid[finest], flow)
    ])  # fmt: skip
    for _ in range(finest):
        flow = 2 * _double(flow)
    return flow[..., :height, :width]


def _refine(
    first: Frames,
    second: Frames,
    coarse_first: Float[Tensor, "n c h w"],
    coarse_second: Float[Tensor, "n c h w"],
    flow: Float[Tensor, "n 2 h w"],
    *,
    window: float,
    final: bool,
) -> Float[Tensor, "n 2 h w"]:
    """Lucas-Kanade iterations on one pyramid level."""
    sigma = window / 2

    def windowed(values: Frames) -> Float[Tensor, "n k h w"]:
        return blur(halve(values), sigma)

    def plane(values: Frames) -> Float[Tensor, "n k h w"]:
        """Coefficients of the plane fitted to every Gaussian window, on an orthonormal basis.

        The slope of the fit is the slope of the blurred values (by parts, for Gaussians).
        """
        mean = windowed(values)
        dx, dy = _gradient(mean)
        return torch.cat([mean, dx.mul_(sigma), dy.mul_(sigma)], dim=1)

    def moments(
        pairs: list[tuple[Frames, Frames]], planes: list[tuple[Tensor, Tensor]]
    ) -> Float[Tensor, "n k h w"]:
        """Mean product over every window of what the planes leave over."""
        products = windowed(torch.stack([_dot(a, b) for a, b in pairs], dim=1))
        return products - torch.stack([_dot(a, b) for a, b in planes], dim=1)

    def residual(flow: Float[Tensor, "n 2 h w"]) -> Frames:
        return warp(second, 2 * _double(flow)).sub_(first)

    dx, dy = _gradient(first)
    px, py = plane(dx), plane(dy)
    hessian = moments([(dx, dx), (dx, dy), (dy, dy)], [(px, px), (px, py), (py, py)])
    xx, xy, yy = hessian.split(1, dim=1)
    xx, yy = xx.clamp(min=0), yy.clamp(min=0)  # the sums are not quite exact
    energy = xx + yy
    pull = PULL * energy / 2 + NOISE
    xx, yy = xx + pull, yy + pull
    determinant = xx * yy - xy * xy
    xx, xy, yy = xx / determinant, xy / determinant, yy / determinant
    texture = blur(energy, sigma) + NOISE
    start = flow
    for step in range(ITERATIONS[final]):
        if step == 1:
            flow = _best(coarse_first, coarse_second, flow, _neighbours(flow, DISTANCES), sigma=1.0)
        error = residual(flow)
        pe = plane(error)
        if step == 0 and not final:
            before = moments([(error, error)], [(pe, pe)])
        right = moments([(dx, error), (dy, error)], [(px, pe), (py, pe)])
        right += 2 * pull * (flow - blur(flow * energy, sigma) / texture)
        x, y = right.split(1, dim=1)
        change = torch.cat([yy * x - xy * y, xx * y - xy * x], dim=1)
        flow = flow - change.clamp_(-LARGEST_STEP, LARGEST_STEP) / 2
        flow = _best(coarse_first, coarse_second, _median(flow), [flow], sigma=1.0)
    if final:
        return flow
    # A wrong match on a coarse level can put the true one out of reach of the finer levels: keep
    # the change only where it lowers the residual.
    error = residual(flow)
    pe = plane(error)
    return torch.where(moments([(error, error)], [(pe, pe)]) <= GAIN * before, flow, start)


def _best(
    first: Frames,
    second: Frames,
    flow: Flow,
    candidates: Iterable[Flow],
    *,
    sigma: float,
    gain: float = GAIN,
    tie: float = TIE,
) -> Flow:
    """Replace `flow` wherever a candidate fits much better, in a window of `sigma` pixels.

    The measure is the variance of the residual, on which an even change of light has no effect.
    """

    def misfit(flow: Flow) -> Float[Tensor, "n 1 H W"]:
        error = warp(second, flow).sub_(first)
        mean = blur(error, sigma)
        return (blur(_dot(error, error)[:, None], sigma)[:, 0] - _dot(mean, mean))[:, None]

    least = misfit(flow)
    for candidate in candidates:
        fit = misfit(candidate)
        better = fit < gain * least - tie
        flow = torch.where(better, candidate, flow)
        least = torch.where(better, fit, least)
    return flow


def _neighbours(flow: Flow, distances: Sequence[int]) -> Iterator[Flow]:
    """The flow of the pixels to the left, right, top and bottom, at each of `distances`."""
    height, width = flow.shape[-2:]
    for distance in distances:
        padded = F.pad(flow, (distance,) * 4, mode="replicate")
        for down, right in ((1, 2), (1, 0), (2, 1), (0, 1)):
            candidate = padded.narrow(-2, down * distance, height)
            yield candidate.narrow(-1, right * distance, width)


# --- filters ---------------------------------------------------------------------------------
# Kornia's, except for the Gaussian blur and the changes of size on a CPU: there, sums of shifted
# planes take half to a fifth of the time (`benchmarks/bench_metric.py` measures both). The last
# bits differ, which a motion that is hard to track multiplies.


def _dot(first: Frames, second: Frames) -> Float[Tensor, "n H W"]:
    """Product summed over the channels."""
    total = first[:, 0] * second[:, 0]
    for channel in range(1, first.shape[1]):
        total.addcmul_(first[:, channel], second[:, channel])
    return total


def _gradient(frames: Frames) -> tuple[Frames, Frames]:
    """Central differences. The channels are the depth, whose gradient is not used."""
    gradient = spatial_gradient3d(frames[:, None])
    return gradient[:, 0, 0], gradient[:, 0, 1]


def blur(values: Frames, sigma: float) -> Frames:
    """Gaussian blur with replicated borders."""
    taps = _taps(sigma)
    if values.device.type != "cpu":
        size = (len(taps), len(taps))
        return gaussian_blur2d(values, size, (sigma, sigma), border_type="replicate")
    reach = len(taps) // 2
    for dim, pad in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):
        length, padded = values.shape[dim], F.pad(values, pad, mode="replicate")
        values = padded.narrow(dim, reach, length) * taps[reach]
        for k in range(reach):
            both = padded.narrow(dim, k, length) + padded.narrow(dim, 2 * reach - k, length)
            values.add_(both, alpha=taps[k])
    return values


@lru_cache(maxsize=8)
def _taps(sigma: float) -> tuple[float, ...]:
    return tuple(get_gaussian_kernel1d(2 * round(2 * sigma) + 1, sigma)[0].tolist())


# Pairs of a sorting network whose fifth output is the median of nine (Paeth 1990).
_MEDIAN_OF_9 = (
    (1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 3),
    (5, 8), (4, 7), (3, 6), (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2),
)  # fmt: skip


def _median(values: Frames) -> Frames:
    """Median of 3x3 pixels that are two pixels apart."""
    height, width = values.shape[-2:]
    padded = F.pad(values, (2, 2, 2, 2), mode="replicate")
    taps = [padded[..., y : y + height, x : x + width] for y in (0, 2, 4) for x in (0, 2, 4)]
    for i, j in _MEDIAN_OF_9:
        taps[i], taps[j] = torch.minimum(taps[i], taps[j]), torch.maximum(taps[i], taps[j])
    return taps[4]


def halve(values: Float[Tensor, "*n H W"]) -> Float[Tensor, "*n h w"]:
    """Mean of every 2x2 pixels."""
    if values.device.type != "cpu":
        height, width = values.shape[-2:]
        return resize(values, (height // 2, width // 2), "area")
    rows = values[..., ::2, :] + values[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)


def _double(values: Float[Tensor, "n c h w"]) -> Frames:
    """Bilinear upsampling by 2."""
    if values.device.type != "cpu":
        height, width = values.shape[-2:]
        return resize(values, (2 * height, 2 * width))
    for dim, pad in ((2, (0, 0, 1, 1)), (3, (1, 1, 0, 0))):
        size, padded = values.shape[dim], F.pad(values, pad, mode="replicate")
        near = 0.75 * values
        values = values.new_empty([*values.shape[: dim + 1], 2, *values.shape[dim + 1 :]])
        for half, start in ((0, 0), (1, 2)):
            far = padded.narrow(dim, start, size)
            torch.add(near, far, alpha=0.25, out=values.select(dim + 1, half))
        values = values.flatten(dim, dim + 1)
    return values
