"""Training and measurement of the judge: `python -m benchmarks.tiny.judge_recipe [--measure]`.

The judge must reject generated shapes that a person would reject. Half of its training images are
therefore damaged as a weak video model damages shapes. The damage is measured, in pixels by which
the worst part of the outline is displaced, and moves the label from the shape to the class
`broken`. All draws have named seeds; a second run on the same machine gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor

from benchmarks.tiny.features import set_scale
from dpo_video.support.atomic import write_tensors, write_text
from dpo_video.support.rng import generator
from dpo_video.tiny import scenes as world
from dpo_video.tiny.judge import BROKEN, WEIGHTS, Judge, Sight, judge_videos, load_judge

INTACT, RUINED = 0.8, 2.0  # displacement of an outline in pixels: accepted up to, rejected from
STRETCH = 7  # pixels
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

Mask = Float[Tensor, "n 1 64 64"]
Images = Float[Tensor, "n 3 64 64"]


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Single frames in layers, so that each layer can be damaged separately."""

    background: Images
    fill: Images
    tint: Images
    """Color of the parts that a corruption adds outside the shape."""
    coverage: Mask
    color: Float[Tensor, "n 8"]
    """Label, as fractions of the area."""
    shape: Int[Tensor, " n"]
    scenery: Float[Tensor, "n 8"]
    """Label of the background, as fractions of the area."""

    def paint(self, coverage: Mask) -> Images:
        """The image, with `coverage` in place of the shape's own coverage."""
        added = (coverage - self.coverage).clamp(min=0)
        kept = torch.minimum(coverage, self.coverage)
        return self.background * (1 - coverage) + self.fill * kept + self.tint * added

    def damage(self, picture: Images) -> Float[Tensor, " n"]:
        """Displacement of the outline where it is largest, in pixels.

        The changed area, weighted by its contrast, per pixel of outline, in the worst window of
        `STRETCH` by `STRETCH` pixels. A mean over the complete outline would hide a local defect.
        """
        changed = _length(picture - self.paint(self.coverage))
        seen = _length(self.fill - self.background)
        contrast = (seen * self.coverage).sum(dim=(1, 2, 3)) / self.coverage.sum(dim=(1, 2, 3))
        worst = F.avg_pool2d(changed, STRETCH, stride=1).amax(dim=(1, 2, 3))
        return STRETCH * worst / contrast


def _length(colors: Images) -> Mask:
    return colors.square().sum(dim=1, keepdim=True).sqrt()


# --- corruptions of shapes --------------------------------------------------------------


def warp(coverage: Mask, strength: Tensor, random: Generator) -> Mask:
    """Bend by a smooth random field of displacements, up to 5 pixels rms."""
    field = _smooth(len(coverage), 2, 8, random)
    weight = coverage / coverage.sum(dim=(2, 3), keepdim=True)
    field = field - (field * weight).sum(dim=(2, 3), keepdim=True)  # translation is no damage
    return _sample(coverage, 5 * strength[:, None, None, None] * field)


def melt(coverage: Mask, strength: Tensor, random: Generator) -> Mask:
    """Round the corners: blur the shape by up to 4 pixels and sharpen its edge."""
    width = 0.4 + 3.6 * strength
    sharpness = (2.5 * width)[:, None, None, None]
    return ((blur(coverage, width) - 0.5) * sharpness + 0.5).clamp(0, 1)


def soften(coverage: Mask, strength: Tensor, random: Generator) -> Mask:
    """Blur the outline by up to 4 pixels."""
    return blur(coverage, 0.1 + 3.9 * strength)


def erase(coverage: Mask, strength: Tensor, random: Generator) -> Mask:
    """Remove parts, up to two thirds."""
    threshold = (-2.5 + 3 * strength)[:, None, None, None]
    return coverage * (3 * (_smooth(len(coverage), 1, 6, random) - threshold) + 0.5).clamp(0, 1)


def sprout(coverage: Mask, strength: Tensor, random: Generator) -> Mask:
    """Add blobs on and around the shape."""
    threshold = (2.6 - 2.3 * strength)[:, None, None, None]
    blobs = (3 * (_smooth(len(coverage), 1, 10, random) - threshold)).clamp(0, 1)
    near = (3 * blur(coverage, torch.full_like(strength, 5.0))).clamp(max=1)
    return torch.maximum(coverage, blobs * near)


def double(coverage: Mask, strength: Tensor, random: Generator) -> Mask:
    """Overlay a second shape, up to opaque."""
    axis = torch.arange(world.SIZE) + 0.5
    mass = coverage.sum(dim=(1, 2, 3))
    x = (coverage.sum(dim=(1, 2)) * axis).sum(dim=1) / mass
    y = (coverage.sum(dim=(1, 3)) * axis).sum(dim=1) / mass
    center = torch.stack([x, y], dim=1)
    offset = 6 * torch.randn(len(coverage), 2, generator=random)
    move = center.roll(1, dims=0) - center + offset
    other = _sample(coverage.roll(1, dims=0), move[:, :, None, None].expand(-1, -1, *(2 * (64,))))
    return torch.maximum(coverage, strength[:, None, None, None] * other)


def glow(coverage: Mask, strength: Tensor, random: Generator) -> Mask:
    """Add a halo, up to 5 pixels wide."""
    width = 1.5 + 1.5 * torch.rand(len(coverage), generator=random)
    halo = (2.5 * blur(coverage, width)).clamp(max=1)
    return torch.maximum(coverage, 0.9 * strength[:, None, None, None] * halo)


Corruption = Callable[[Mask, Tensor, Generator], Mask]
CORRUPTIONS: Mapping[str, Corruption] = {
    f.__name__: f for f in (warp, melt, soften, erase, sprout, double, glow)
}
"""Name to `(coverage, strength in [0, 1] per frame, generator) -> coverage`."""


def blur(images: Tensor, width: Float[Tensor, " n"]) -> Tensor:
    """Gaussian blur with a width (standard deviation in pixels) per image."""
    n, channels = images.shape[:2]
    reach = math.ceil(3 * float(width.max()))
    kernel = torch.exp(-((torch.arange(-reach, reach + 1) / width[:, None]) ** 2) / 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    flat = F.pad(images.reshape(1, n * channels, *images.shape[2:]), (reach,) * 4, "replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=n * channels)
    return flat.view_as(images)


def _smooth(n: int, channels: int, cells: int, random: Generator) -> Tensor:
    """Random fields of about unit variance with a correlation length of `64 / cells` pixels."""
    coarse = 1.3 * torch.randn(n, channels, cells, cells, generator=random)
    return F.interpolate(coarse, size=(64, 64), mode="bicubic", align_corners=False)


def _sample(images: Tensor, move: Float[Tensor, "n 2 64 64"]) -> Tensor:
    """Sample every pixel at an offset of `move` pixels (x, y)."""
    axis = (torch.arange(world.SIZE) + 0.5) * 2 / world.SIZE - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    grid = grid + move.permute(0, 2, 3, 1) * 2 / world.SIZE
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


# --- training data ----------------------------------------------------------------------


def draw_frames(n: int, random: Generator) -> Frames:
    """Frames of the world; a tenth have two colors, and a tenth two backgrounds."""
    drawn = world.draw_scenes(n, random)
    frame = torch.randint(world.FRAMES, (n,), generator=random)
    at = (torch.arange(n), frame)
    drawn = replace(drawn, center=drawn.center[at][:, None], angle=drawn.angle[at][:, None])
    coverage = world.coverage(drawn)[:, 0]
    color, fill = _mixed(drawn.color, coverage, _fills(), random)
    scenery, background = _mixed(drawn.background, 1 - coverage, _sceneries(), random)
    tint = torch.where(
        torch.rand(n, 1, 1, 1, generator=random) < 0.5,
        fill,
        torch.rand(n, 3, 1, 1, generator=random),
    )
    return Frames(
        background=background,
        fill=fill,
        tint=tint,
        coverage=coverage,
        color=color,
        shape=drawn.shape,
        scenery=scenery,
    )


def _fills() -> Tensor:
    palette = torch.tensor(list(world.COLORS.values())) / 255
    return palette[:, :, None, None].expand(-1, -1, world.SIZE, world.SIZE)


def _sceneries() -> Tensor:
    """Every background without a shape, which is drawn far outside the image."""
    kinds = len(world.BACKGROUNDS)
    one = world.draw_scenes(kinds, torch.Generator().manual_seed(0), frames=1)
    outside = one.center - 1000
    return world.render(replace(one, background=torch.arange(kinds), center=outside))[:, 0]


def _mixed(
    kind: Int[Tensor, " n"], area: Mask, pictures: Tensor, random: Generator
) -> tuple[Float[Tensor, "n k"], Images]:
    """Labels and one picture per item; a tenth are mixed with another picture, in patches.

    The label is each picture's fraction of `area`: weak models do mix colors and backgrounds.
    """
    n, kinds = len(kind), len(pictures)
    other = torch.randint(kinds, (n,), generator=random)
    patches = (4 * (_smooth(n, 1, 4, random) - 0.5)).clamp(0, 1)
    patches = patches * (torch.rand(n, 1, 1, 1, generator=random) < 0.1)
    fraction = ((patches * area).sum(dim=(1, 2, 3)) / area.sum(dim=(1, 2, 3)))[:, None]
    label = F.one_hot(kind, kinds) * (1 - fraction) + F.one_hot(other, kinds) * fraction
    return label, torch.lerp(pictures[kind], pictures[other], patches)


def corrupt(frames: Frames, random: Generator) -> Mask:
    """Damage half of the frames, each with one corruption of random strength."""
    n = len(frames.coverage)
    coverage = frames.coverage.clone()
    strength = torch.rand(n, generator=random)
    way = torch.randint(2 * len(CORRUPTIONS), (n,), generator=random)
    for index, corruption in enumerate(CORRUPTIONS.values()):
        chosen = way == index
        if chosen.any():
            coverage[chosen] = corruption(coverage[chosen], strength[chosen], random)
    return coverage


def develop(images: Images, random: Generator) -> Images:
    """Augment: position, scale, exposure, tint, texture, sharpness."""
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=random)

    zoom = torch.diag_embed(uniform(0.93, 1.07, 2))
    grid = F.affine_grid(
        torch.cat([zoom, uniform(-0.08, 0.08, 2, 1)], dim=2), list(images.shape), False
    )
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    images = blur(images, uniform(0.1, 0.7))
    images = images * uniform(0.94, 1.06, 3, 1, 1) + uniform(-0.02, 0.02, 3, 1, 1)
    images = images + uniform(0, 0.04, 1, 1, 1) * _smooth(n, 3, 16, random)
    images = images + uniform(0, 0.03, 1, 1, 1) * torch.randn(images.shape, generator=random)
    return images.clamp(0, 1)


def brokenness(damage: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Label of the class `broken`: a smooth ramp from 0 at `INTACT` to 1 at `RUINED`."""
    ramp = ((damage - INTACT) / (RUINED - INTACT)).clamp(0, 1)
    return ramp**2 * (3 - 2 * ramp)


def loss_on(judge: Judge, frames: Frames, coverage: Mask, random: Generator) -> Tensor:
    """Cross-entropy of the three heads with their soft labels."""
    picture = frames.paint(coverage)
    broken = brokenness(frames.damage(picture))[:, None]
    kinds = BROKEN + 1
    shape = F.one_hot(frames.shape, kinds) * (1 - broken)
    shape = shape + F.one_hot(torch.tensor(BROKEN), kinds) * broken
    # The color of a shape that is mostly erased or overgrown has little weight.
    kept = torch.minimum(coverage, frames.coverage).sum(dim=(1, 2, 3))
    weight = kept / torch.maximum(coverage, frames.coverage).sum(dim=(1, 2, 3))
    seen: Sight = judge(develop(picture, random))
    return -(
        (shape * seen.shape).sum(dim=1)
        + weight * (frames.color * seen.color).sum(dim=1)
        + (frames.scenery * seen.background).sum(dim=1)
    ).mean()


def train(steps: int, batch: int, console: Console, clips: int = 512) -> Judge:
    """Train from random weights with AdamW and a one-cycle schedule.

    Args:
        steps: Number of steps.
        batch: Frames per step.
        console: Prints the progress.
        clips: Number of real clips that define the scale of the features.
    """
    torch.manual_seed(0)
    judge = Judge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    started, recent = time.monotonic(), 0.0
    for step in range(steps):
        random = generator("judge", "train", step)
        frames = draw_frames(batch, random)
        loss = loss_on(judge, frames, corrupt(frames, random), random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if (step + 1) % 250 == 0:
            spent = time.monotonic() - started
            console.print(f"step {step + 1} of {steps}: loss {recent:.3f}, {spent:.0f} s")
    judge.eval().requires_grad_(False)
    set_scale(judge, real_clips(clips, "judge", "scale")[0])
    return judge


def real_clips(n: int, *seed: str | int) -> tuple[Float[Tensor, "n 3 16 64 64"], list[str]]:
    """Freshly rendered clips and their captions."""
    drawn = world.draw_scenes(n, generator(*seed))
    return world.render(drawn).transpose(1, 2), drawn.captions()


# --- reliability --------------------------------------------------------------


@torch.no_grad()
def measure(judge: Judge, clips: int = 200, frames: int = 400) -> dict[str, object]:
    """Accuracy on held-out real clips, and results on corrupted frames, by corruption and strength.

    Returns:
        `accuracy`: per head, the fraction of frames classified right. `corrupted`: by name, one row
        per strength with `damage` (pixels, mean), `rejected` (fraction of frames whose most
        probable class is broken) and `right` (mean probability of the true shape).
    """
    videos, captions = real_clips(clips, "judge", "held out")
    seen = judge_videos(videos, judge)
    described = [words for text in captions if (words := world.parse_caption(text))]
    truth = {
        "color": _indices(world.COLORS, [w.color for w in described]),
        "shape": _indices(world.SHAPES, [w.shape for w in described]),
        "background": _indices(world.BACKGROUNDS, [w.background for w in described]),
    }
    accuracy = {
        head: float((getattr(seen, head).argmax(dim=-1) == index[:, None]).float().mean())
        for head, index in truth.items()
    }
    random = generator("judge", "corrupted")
    held_out = draw_frames(frames, random)
    corrupted = {
        name: [_judged(judge, held_out, corruption, strength) for strength in STRENGTHS]
        for name, corruption in CORRUPTIONS.items()
    }
    return {"clips": clips, "accuracy": accuracy, "frames": frames, "corrupted": corrupted}


def _indices(names: Iterable[str], words: list[str]) -> Int[Tensor, " n"]:
    order = list(names)
    return torch.tensor([order.index(word) for word in words])


def _judged(
    judge: Judge, frames: Frames, corruption: Corruption, strength: float
) -> dict[str, float]:
    n = len(frames.shape)
    # Equal draws at every strength: rows differ by strength alone.
    coverage = corruption(frames.coverage, torch.full((n,), strength), generator("judge", "draws"))
    picture = frames.paint(coverage)
    shape = judge(picture).shape
    return {
        "strength": strength,
        "damage": float(frames.damage(picture).mean()),
        "rejected": float((shape.argmax(dim=1) == BROKEN).float().mean()),
        "right": float(shape.exp()[torch.arange(n), frames.shape].mean()),
    }


def report(measured: dict, console: Console) -> None:  # type: ignore[type-arg]
    """Print the result of `measure`, as tables and as JSON."""
    table = Table(title=f"Right on {measured['clips']} held-out clips")
    for head in measured["accuracy"]:
        table.add_column(head)
    table.add_row(*(f"{accuracy:.2%}" for accuracy in measured["accuracy"].values()))
    console.print(table)
    table = Table(
        title="Corrupted frames: rejected / probability of the true shape (damage in pixels)"
    )
    table.add_column("strength")
    for strength in STRENGTHS:
        table.add_column(f"{strength:g}")
    for name, rows in measured["corrupted"].items():
        cells = [f"{r['rejected']:.0%} / {r['right']:.2f} ({r['damage']:.1f})" for r in rows]
        table.add_row(name, *cells)
    console.print(table)
    console.print_json(json.dumps(measured))


def main(arguments: Iterable[str] | None = None) -> None:
    """Train the judge and save it; with `--measure`, measure the saved judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m benchmarks.tiny.judge_recipe"
    )
    parser.add_argument(
        "--measure", action="store_true", help="measure the saved judge; do not train"
    )
    parser.add_argument("--json", type=Path, help="with --measure: file for the numbers")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=96, help="frames per step")
    options = parser.parse_args(None if arguments is None else list(arguments))
    console = Console()
    if not options.measure:
        judge = train(options.steps, options.batch, console)
        state = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
        write_tensors(options.out, state)
        return
    measured = measure(load_judge())
    report(measured, console)
    if options.json:
        write_text(options.json, json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
