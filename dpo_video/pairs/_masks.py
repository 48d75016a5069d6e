"""Moving blobs: the region of a video that LocalDPO repaints (Huang et al. 2026, arXiv 2601.04068).

Outlines are drawn in pixels and filled at the centres of the latent cells, which equals filling the
picture and taking the nearest pixel.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from dpo_video.errors import UserError

EDGES = (6, 8)  # cubic Bezier pieces of an outline, inclusive
ROUGHNESS = (0.6, 0.7, 0.8)  # r: control points lie 1 - r to 1 + r from the centre
# The paper's generator draws the outline with a plotting library and takes the whole canvas as the
# blob's box: the axes fill this share of it (width, height) and extend a tenth beyond the outermost
# coordinates. Without this factor, blobs would cover 3.5 times the area.
CANVAS = (0.775, 0.77)
MARGIN = 1.1
SCALES = (0.9, 1.1)  # relative to the blob's size
TURNS = (1.0, 10.0)  # degrees
TURN_NOISE = 0.25  # radians; standard deviation of the direction's change per latent frame
SAMPLES = 16  # points per Bezier piece
TRIES = 100


class RegionOptions(BaseModel):
    """Options of the repainted region; the defaults are LocalDPO's."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_blobs: int = Field(default=5, ge=1)
    """The region is the union of 1 to this many blobs."""
    min_size: float = Field(default=1 / 3, gt=0, lt=1)
    """Smallest height and width of a blob's box, as a share of the picture's."""
    shrink_share: float = Field(default=0.7, ge=0, le=1)
    """Probability that all n blobs are scaled by 1/sqrt(n), so that more do not cover more."""
    shrink_each_share: float = Field(default=0.5, ge=0, le=1)
    """Otherwise, the probability of each blob to be scaled so."""
    moving_share: float = Field(default=0.5, ge=0, le=1)
    """Probability that a blob moves."""
    max_speed: float = Field(default=3.0, gt=0)
    """Largest initial speed of a blob, in pixels per latent frame."""
    scale_share: float = Field(default=0.25, ge=0, le=1)
    """Probability per latent frame that a moving blob changes its size by up to a tenth."""
    turn_share: float = Field(default=0.25, ge=0, le=1)
    """Probability per latent frame that a moving blob turns by 1 to 10 degrees; it does not turn in
    a frame in which it changes its size."""


PUBLISHED = RegionOptions()


def draw_region(
    latent_shape: tuple[int, int, int],
    pixels: tuple[int, int],
    generator: Generator,
    options: RegionOptions = PUBLISHED,
) -> Float[Tensor, "1 f h w"]:
    """Draw a region: 1 where the video is repainted, 0 elsewhere. No frame is empty or full.

    Args:
        latent_shape: `(f, h, w)` of the latents.
        pixels: `(H, W)` of the decoded video.
        generator: The only source of randomness, on the CPU.
        options: Sizes, numbers and motion of the blobs.

    Raises:
        UserError: If the latents are too coarse for the blobs.
    """
    for _ in range(TRIES):
        region = _draw_blobs(latent_shape, pixels, generator, options)
        covered = region.float().mean(dim=(1, 2))
        if covered.min() > 0 and covered.max() < 1:
            return region[None].float()
    size = "x".join(str(n) for n in latent_shape)
    raise UserError(
        f"None of {TRIES} regions fits latents of {size}: each left a frame empty or full. "
        "Use a larger picture, or larger or fewer blobs (min_size, max_blobs)."
    )


def _draw_blobs(
    latent_shape: tuple[int, int, int],
    pixels: tuple[int, int],
    generator: Generator,
    options: RegionOptions,
) -> Bool[Tensor, "f h w"]:
    frames, *cells = latent_shape
    blobs = _integer(1, options.max_blobs, generator)
    shrunk = _uniform(0.0, 1.0, generator) < options.shrink_share
    region = torch.zeros(latent_shape, dtype=torch.bool)
    cell = torch.tensor([pixels[1] / cells[1], pixels[0] / cells[0]])
    for _ in range(blobs):
        small = shrunk or _uniform(0.0, 1.0, generator) < options.shrink_each_share
        scale = 1 / math.sqrt(blobs) if small else 1.0
        outline = draw_outline(generator) * scale * _draw_box(pixels, generator, options)
        moving = _uniform(0.0, 1.0, generator) < options.moving_share
        path = _move(outline, frames if moving else 1, pixels, generator, options)
        region |= fill(path / cell, cells[0], cells[1])
    return region


def _draw_box(
    pixels: tuple[int, int], generator: Generator, options: RegionOptions
) -> Float[Tensor, " 2"]:
    """Width and height of a blob's box, in pixels."""
    sides = [
        _integer(min(int(n * options.min_size), n - 1), n - 1, generator) for n in reversed(pixels)
    ]
    return torch.tensor(sides, dtype=torch.float32)


def draw_outline(generator: Generator) -> Float[Tensor, "n 2"]:
    """Points `x, y` on a closed curve of cubic Bezier pieces, inside a box of 1x1.

    The control points' angles increase and a piece spans less than half a turn, so the curve's
    angles around the centre increase, too (its basis is totally positive). An outline therefore
    never crosses itself, and a blob has neither holes nor separate parts.
    """
    edges = _integer(*EDGES, generator)
    roughness = ROUGHNESS[_integer(0, len(ROUGHNESS) - 1, generator)]
    angles = torch.arange(3 * edges) * (2 * math.pi / (3 * edges))
    radii = 2 * roughness * torch.rand(3 * edges, generator=generator) + 1 - roughness
    control = radii[:, None] * torch.stack([angles.cos(), angles.sin()], dim=1)
    # Neighbouring pieces share an end point, and the last piece ends where the first begins.
    pieces = torch.cat([control, control[:1]]).unfold(0, 4, 3)
    t = torch.arange(SAMPLES)[:, None] / SAMPLES
    basis = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
    curve = torch.einsum("tk,edk->etd", basis, pieces).flatten(0, 1)
    low, high = MARGIN * control.min(), MARGIN * control.max()
    return (curve - low) / (high - low) * torch.tensor(CANVAS)


def _move(
    outline: Float[Tensor, "n 2"],
    frames: int,
    pixels: tuple[int, int],
    generator: Generator,
    options: RegionOptions,
) -> Float[Tensor, "k n 2"]:
    """Place an outline at random and let it drift inside the picture.

    OURS: positions are not rounded to pixels; changes of size and direction persist and apply to
    the blob itself. (The public relatives of the authors' generator round every step towards zero
    and turn single frames about the centre of the picture, which moves the blob off its path.)
    """
    picture = torch.tensor([float(pixels[1]), float(pixels[0])])
    shape, half = _centred(outline)
    position = half + (picture - 2 * half).clamp(min=0) * torch.rand(2, generator=generator)
    speed = _uniform(min(1.0, options.max_speed), options.max_speed, generator)
    angle = _uniform(0.0, 2 * math.pi, generator)
    path = [shape + position]
    for _ in range(frames - 1):
        position = position + speed * torch.tensor([math.cos(angle), math.sin(angle)])
        speed += options.max_speed / 2 * _normal(generator)
        angle += TURN_NOISE * _normal(generator)
        if bool(((position < half) | (position > picture - half)).any()):  # at the border, restart
            speed = abs(options.max_speed / 2 * _normal(generator))
            angle = _uniform(0.0, 2 * math.pi, generator)
        change = _uniform(0.0, 1.0, generator)
        if change < options.scale_share:
            shape = shape * _uniform(*SCALES, generator)
        elif change < options.scale_share + options.turn_share:
            turn = math.radians(_uniform(*TURNS, generator))
            cos, sin = math.cos(turn), math.sin(turn)
            shape = shape @ torch.tensor([[cos, sin], [-sin, cos]])
        shape, half = _centred(shape)
        # A blob larger than the picture stays at its centre.
        room = (picture / 2 - half).clamp(min=0)
        position = torch.minimum(torch.maximum(position, picture / 2 - room), picture / 2 + room)
        path.append(shape + position)
    return torch.stack(path)


def _centred(shape: Float[Tensor, "n 2"]) -> tuple[Float[Tensor, "n 2"], Float[Tensor, " 2"]]:
    """The outline relative to the centre of its bounding box, and half the size of that box."""
    low, high = shape.amin(dim=0), shape.amax(dim=0)
    return shape - (low + high) / 2, (high - low) / 2


def fill(polygons: Float[Tensor, "k n 2"], height: int, width: int) -> Bool[Tensor, "k h w"]:
    """Whether the centres of a grid's cells lie inside closed polygons, by the even-odd rule.

    Polygons are given by their corners `x, y` in cells.
    """
    start, end = polygons, polygons.roll(-1, dims=1)
    rows = torch.arange(height) + 0.5
    x0, y0, x1, y1 = (axis[..., None] for axis in (*start.unbind(-1), *end.unbind(-1)))
    crosses = (y0 > rows) != (y1 > rows)
    rise = torch.where(y1 == y0, 1.0, y1 - y0)  # a level edge crosses no row
    x = x0 + (x1 - x0) * (rows - y0) / rise
    # Every crossing flips all cells to its right.
    first = (x + 0.5).floor().clamp(0, width).long().transpose(1, 2)
    turns = torch.zeros(len(polygons), height, width + 1, dtype=torch.int32)
    turns.scatter_add_(2, first, crosses.transpose(1, 2).int())
    return turns[..., :width].cumsum(dim=2) % 2 == 1


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _normal(generator: Generator) -> float:
    return torch.randn((), generator=generator).item()


def _integer(low: int, high: int, generator: Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))
