"""The procedural world that `tiny` was trained on: one flat shape that moves over a background.

The caption of a clip and the position of the shape in every frame are known, which makes the model
measurable and the metrics testable.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SIZE = 64  # pixels
FRAMES = 16
FPS = 8

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 38),
    "orange": (246, 140, 30),
    "yellow": (246, 218, 44),
    "green": (38, 168, 70),
    "cyan": (48, 202, 216),
    "blue": (44, 90, 232),
    "purple": (140, 58, 190),
    "pink": (246, 132, 192),
}
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "black": ((16, 16, 20), (16, 16, 20)),
    "white": ((238, 238, 236), (238, 238, 236)),
    "gray": ((126, 126, 128), (126, 126, 128)),
    "navy": ((24, 30, 76), (24, 30, 76)),
    "brown": ((92, 64, 46), (92, 64, 46)),
    "sand": ((214, 200, 166), (214, 200, 166)),
    "striped": ((196, 198, 206), (156, 158, 168)),
    "checkered": ((64, 66, 72), (98, 100, 108)),
}
MOTIONS = ("left", "right", "up", "down", "circling", "spinning")
SPEEDS: dict[str, tuple[float, float]] = {"slowly": (0.5, 0.9), "quickly": (1.2, 2.0)}  # px/frame
RADII = (10.0, 15.0)  # pixels, uniform
PATTERN = 8  # pixels, the width of a stripe and of a checker


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    corners = []
    for i in range(2 * points):
        radius = 1.0 if i % 2 == 0 else inner
        angle = math.pi * i / points - math.pi / 2
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


_ARM = 0.36
# Corners in units of the radius, in drawing order; a circle has none.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)],
    "star": _star(5, 0.45),
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip
SHAPES = tuple(OUTLINES)


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A batch of scenes: indices of the words, and the pose in every frame (pixels, radians)."""

    shape: Int[Tensor, " b"]
    color: Int[Tensor, " b"]
    background: Int[Tensor, " b"]
    motion: Int[Tensor, " b"]
    speed: Int[Tensor, " b"]
    radius: Float[Tensor, " b"]
    center: Float[Tensor, "b F 2"]
    angle: Float[Tensor, "b F"]

    def __len__(self) -> int:
        return len(self.shape)

    def captions(self) -> list[str]:
        """One sentence per scene."""
        parts = zip(self.shape, self.color, self.background, self.motion, self.speed, strict=True)
        return [
            caption(SHAPES[s], list(COLORS)[c], list(BACKGROUNDS)[b], MOTIONS[m], list(SPEEDS)[v])
            for s, c, b, m, v in parts
        ]


def caption(shape: str, color: str, background: str, motion: str, speed: str) -> str:
    """The sentence that describes a scene."""
    verb = motion if motion in ("circling", "spinning") else f"moving {motion}"
    article = "an" if color[0] in "aeiou" else "a"
    return f"{article} {color} {shape} {verb} {speed} on a {background} background"


@dataclass(frozen=True)
class Words:
    """The words of a caption, in the order of `caption()`'s arguments."""

    shape: str
    color: str
    background: str
    motion: str
    speed: str


def parse_caption(text: str) -> Words | None:
    """The inverse of `caption()`, ignoring case and spacing; None for any other text."""
    return all_captions().get(" ".join(text.lower().split()))


@functools.cache
def all_captions() -> dict[str, Words]:
    """Every sentence of this world and its words, in a fixed order."""
    parts = itertools.product(SHAPES, COLORS, BACKGROUNDS, MOTIONS, SPEEDS)
    return {caption(*part): Words(*part) for part in parts}


def spread_captions(n: int) -> list[str]:
    """`n` captions in which every word of the world occurs about equally often."""
    counts = (len(SHAPES), len(COLORS), len(BACKGROUNDS), len(MOTIONS), len(SPEEDS))
    names = (list(SHAPES), list(COLORS), list(BACKGROUNDS), list(MOTIONS), list(SPEEDS))
    captions = []
    for i in range(n):
        # Each axis cycles with its own period; the shift after each cycle decorrelates axes of
        # equal length.
        picks = [(i + axis * (i // k)) % k for axis, k in enumerate(counts)]
        captions.append(caption(*(names[axis][pick] for axis, pick in enumerate(picks))))
    return captions


def draw_scenes(n: int, generator: torch.Generator, frames: int = FRAMES) -> Scenes:
    """Draw `n` scenes in which the shape stays inside the image."""

    def choice(options: int) -> Int[Tensor, " b"]:
        return torch.randint(options, (n,), generator=generator)

    def uniform(low: float, high: float) -> Float[Tensor, " b"]:
        return low + (high - low) * torch.rand(n, generator=generator)

    motion, speed = choice(len(MOTIONS)), choice(len(SPEEDS))
    bounds = torch.tensor(list(SPEEDS.values()))[speed]
    pace = bounds[:, 0] + (bounds[:, 1] - bounds[:, 0]) * uniform(0, 1)
    radius = uniform(*RADII)
    time = torch.arange(frames) - (frames - 1) / 2
    steps = torch.tensor([[-1.0, 0], [1, 0], [0, -1], [0, 1], [0, 0], [0, 0]])[motion]
    travel = steps[:, None] * (pace[:, None] * time)[..., None]
    circling = motion == MOTIONS.index("circling")
    orbit = 7.0
    turn = uniform(0, 2 * math.pi)[:, None] + pace[:, None] / orbit * time
    circle = orbit * torch.stack([turn.cos(), turn.sin()], dim=-1)
    path = torch.where(circling[:, None, None], circle, travel)
    reach = path.abs().amax(dim=1) + radius[:, None] + 1
    room = (SIZE / 2 - reach).clamp(min=0)
    middle = SIZE / 2 + room * (2 * torch.rand(n, 2, generator=generator) - 1)
    # Shorten a path that would leave the image.
    fit = ((SIZE / 2 - radius[:, None] - 1) / path.abs().amax(dim=1).clamp(min=1e-6)).clamp(max=1)
    spinning = motion == MOTIONS.index("spinning")
    tilt = uniform(-0.25, 0.25)[:, None]
    spin = torch.where(spinning[:, None], pace[:, None] / radius[:, None] * time, 0.0)
    return Scenes(
        shape=choice(len(SHAPES)),
        color=choice(len(COLORS)),
        background=choice(len(BACKGROUNDS)),
        motion=motion,
        speed=speed,
        radius=radius,
        center=middle[:, None] + path * fit[:, None],
        angle=tilt + spin,
    )


def render(
    scenes: Scenes,
    frames: Int[Tensor, "b k"] | None = None,
    origin: Float[Tensor, "b k 2"] | None = None,
    size: int = SIZE,
) -> Float[Tensor, "b k 3 size size"]:
    """Draw frames of the scenes, anti-aliased, in [0, 1].

    Args:
        scenes: The scenes.
        frames: Indices of the frames; default: all.
        origin: Upper left corner of a crop, in pixels; default: (0, 0).
        size: Width and height of the image or crop, in pixels.
    """
    coverage, points = _coverage(scenes, frames, origin, size)
    palette = torch.tensor(list(COLORS.values())) / 255.0
    fill = palette[scenes.color][:, None, :, None, None]
    return torch.lerp(
        _background(scenes, points), fill.expand(-1, points.shape[1], -1, -1, -1), coverage
    )


def coverage(scenes: Scenes) -> Float[Tensor, "b F 1 64 64"]:
    """Fraction of each pixel that the shape covers, in [0, 1]."""
    return _coverage(scenes, None, None, SIZE)[0]


def _coverage(
    scenes: Scenes, frames: Tensor | None, origin: Tensor | None, size: int
) -> tuple[Float[Tensor, "b k 1 h w"], Float[Tensor, "b k h w 2"]]:
    center, angle = scenes.center, scenes.angle
    if frames is not None:
        center = center.gather(1, frames[..., None].expand(-1, -1, 2))
        angle = angle.gather(1, frames)
    axis = torch.arange(size) + 0.5
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).expand(
        *angle.shape, size, size, 2
    )
    if origin is not None:
        points = points + origin[:, :, None, None]
    local = points - center[:, :, None, None]
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    x, y = local.unbind(-1)
    local = torch.stack([cos * x + sin * y, cos * y - sin * x], dim=-1)
    distance = torch.empty(local.shape[:-1])
    for index, outline in enumerate(OUTLINES.values()):
        chosen = scenes.shape == index
        if chosen.any():
            distance[chosen] = _signed_distance(local[chosen], scenes.radius[chosen], outline)
    return (0.5 - distance).clamp(0, 1)[:, :, None], points


def _signed_distance(
    points: Float[Tensor, "n k h w 2"],
    radius: Float[Tensor, " n"],
    outline: list[tuple[float, float]],
) -> Float[Tensor, "n k h w"]:
    """Distance in pixels from each point to the outline, negative inside."""
    if not outline:
        return points.norm(dim=-1) - radius[:, None, None, None]
    scale = radius[:, None, None, None]
    x, y = points[..., 0] / scale, points[..., 1] / scale
    nearest = torch.full_like(x, torch.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in itertools.pairwise([*outline, outline[0]]):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        if ay != by:  # a ray to the right crosses this edge: even-odd rule
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    distance = nearest.sqrt()
    return torch.where(inside, -distance, distance) * scale


def _background(scenes: Scenes, points: Float[Tensor, "b k h w 2"]) -> Float[Tensor, "b k 3 h w"]:
    palette = torch.tensor(list(BACKGROUNDS.values()))[scenes.background] / 255.0
    cell = (points / PATTERN).floor()
    stripes = cell[..., 0] % 2
    checkers = cell.sum(dim=-1) % 2
    names = list(BACKGROUNDS)
    striped = (scenes.background == names.index("striped"))[:, None, None, None]
    second = torch.where(striped, stripes, checkers)[:, :, None]
    first_color, second_color = (palette[:, i, None, :, None, None] for i in (0, 1))
    return first_color + (second_color - first_color) * second
