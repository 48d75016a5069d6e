"""Quality of the embedded model in numbers and pictures: `python -m benchmarks.tiny.quality`.

Every number is computed for the model's videos, for held-out real clips, and for those clips after
the autoencoder, which bounds what the model can reach.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.tiny.features import video_features
from benchmarks.tiny.frechet import frechet_distance
from dpo_video.strategies import VideoModel
from dpo_video.support.atomic import publishing, write_text
from dpo_video.support.rng import generator
from dpo_video.tiny import WEIGHTS
from dpo_video.tiny import scenes as world
from dpo_video.tiny.judge import BROKEN, FEATURES, judge_videos
from dpo_video.types import Placement, Videos

BREAKS_UP = 0.25  # of a clip's frames
_AT_ONCE = 8
_SHOWN_FRAMES, _ZOOM, _LINE = 8, 3, 18  # frames per row, factor, pixels

Numbers = dict[str, float]


def sample(model: VideoModel, captions: Sequence[str], seed: int) -> Videos:
    """One video per caption, each from its own seeded noise, with the family's default settings."""
    videos = []
    for start in track(range(0, len(captions), _AT_ONCE), description="sampling"):
        chosen = range(start, min(start + _AT_ONCE, len(captions)))
        noise = torch.stack(
            [
                torch.randn(model.latent_shape, generator=generator(seed, "quality", i))
                for i in chosen
            ]
        )
        context = model.encode_prompts([captions[i] for i in chosen])
        latents = model.sample(context, noise.to(model.device))
        videos.append(model.decode_videos(latents).float().cpu())
    return torch.cat(videos)


def through_autoencoder(model: VideoModel, videos: Videos) -> Videos:
    """Encode and decode."""
    parts = videos.split(_AT_ONCE)
    return torch.cat(
        [
            model.decode_videos(model.encode_videos(part.to(model.device))).float().cpu()
            for part in track(parts, description="autoencoder")
        ]
    )


def real(n: int, seed: int, name: str) -> tuple[Videos, list[str]]:
    """Freshly rendered clips and their captions."""
    drawn = world.draw_scenes(n, generator(seed, "quality", name))
    return world.render(drawn).transpose(1, 2).contiguous(), drawn.captions()


def describe(videos: Videos, captions: Sequence[str]) -> Numbers:
    """Means over the videos of the judge's accuracies and of the metrics."""
    from dpo_video.metric.caption_match import CaptionMatch
    from dpo_video.metric.dynamic_degree import DynamicDegree
    from dpo_video.metric.frame_difference import FrameDifference
    from dpo_video.metric.warp_error import WarpError

    described = [words for text in captions if (words := world.parse_caption(text))]
    seen = judge_videos(videos)
    truth = {
        "color": [list(world.COLORS).index(words.color) for words in described],
        "shape": [world.SHAPES.index(words.shape) for words in described],
        "background": [list(world.BACKGROUNDS).index(words.background) for words in described],
    }
    right = {
        f"{head}_right": float(
            (getattr(seen, head).argmax(dim=-1).mode(dim=1).values == torch.tensor(index))
            .float()
            .mean()
        )
        for head, index in truth.items()
    }
    metrics = {
        "caption_match": CaptionMatch(),
        "warp_error": WarpError(),
        "frame_difference": FrameDifference(),
        "dynamic_degree": DynamicDegree(),
    }
    means = {
        name: float(
            torch.cat(
                [
                    metric(part, captions[i * _AT_ONCE : (i + 1) * _AT_ONCE])
                    for i, part in enumerate(videos.split(_AT_ONCE))
                ]
            ).mean()
        )
        for name, metric in metrics.items()
    }
    broken = breaks_up(seen.shape.argmax(dim=-1)).float().mean()
    return {**right, "breaks_up": float(broken), **means}


def breaks_up(shapes: Int[Tensor, "b F"]) -> Bool[Tensor, " b"]:
    """Whether over a quarter of a clip's frames show a broken shape or not its usual one."""
    most_frequent = shapes.mode(dim=1, keepdim=True).values
    return ((shapes != most_frequent) | (shapes == BROKEN)).float().mean(dim=1) > BREAKS_UP


def distances(videos: Videos, reference: Videos) -> Numbers:
    """Frechet distances in judge features: of all features, and of each half."""
    first, second = video_features(videos), video_features(reference)
    return {
        "frechet": frechet_distance(first, second),
        "frechet_appearance": frechet_distance(first[:, :FEATURES], second[:, :FEATURES]),
        "frechet_change": frechet_distance(first[:, FEATURES:], second[:, FEATURES:]),
    }


def contact_sheet(path: Path, videos: Videos, captions: Sequence[str]) -> None:
    """Write a PNG with one clip per row, below its caption."""
    shown = torch.linspace(0, videos.shape[2] - 1, _SHOWN_FRAMES).round().long()
    strips = videos[:, :, shown].permute(0, 3, 2, 4, 1).flatten(2, 3)  # b H (frames W) 3
    pixels = (255 * strips.clamp(0, 1)).round().byte().numpy()
    height, width = (_ZOOM * size for size in pixels.shape[1:3])
    sheet = Image.new("RGB", (width, len(videos) * (height + _LINE)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_LINE - 5)
    for i, (strip, caption) in enumerate(zip(pixels, captions, strict=True)):
        top = i * (height + _LINE)
        draw.text((3, top + 1), caption, fill="black", font=font)
        row = Image.fromarray(strip).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(row, (0, top + _LINE))
    with publishing(path) as partial:
        sheet.save(partial)


def report(numbers: dict[str, Numbers], console: Console) -> None:
    """Print a table with one column per set of videos."""
    table = Table(title="Means over videos (Frechet: to other real clips)")
    table.add_column("")
    for name in numbers:
        table.add_column(name, justify="right")
    for row in next(iter(numbers.values())):
        table.add_row(row, *(f"{column[row]:.4g}" for column in numbers.values()))
    console.print(table)


def main(arguments: Iterable[str] | None = None) -> None:
    """Sample, measure, print, and write the numbers and a contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.tiny.quality")
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="folder that the recipe wrote")
    parser.add_argument("--clips", type=int, default=94)
    parser.add_argument("--rows", type=int, default=24, help="clips on the contact sheet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/quality.json"),
        help="numbers; the contact sheet is written beside them",
    )
    options = parser.parse_args(None if arguments is None else list(arguments))

    from dpo_video.backbone.tiny import Tiny

    console = Console()
    model = Tiny(model=options.model).load(Placement(torch.device(options.device)))
    captions = world.spread_captions(options.clips)
    generated = sample(model, captions, options.seed)
    reference, _ = real(options.clips, options.seed, "reference")
    clips, described = real(options.clips, options.seed, "clips")
    sets = {
        "generated": (generated, captions),
        "real": (clips, described),
        "real, autoencoded": (through_autoencoder(model, clips), described),
    }
    numbers = {
        name: {**describe(videos, texts), **distances(videos, reference)}
        for name, (videos, texts) in sets.items()
    }
    report(numbers, console)
    settings = {"clips": options.clips, "seed": options.seed, "model": model.identity}
    features = "judge features: mean and mean absolute change over time, 24 each"
    found = {**settings, "features": features, "sets": numbers}
    write_text(options.out, json.dumps(found, indent=2))
    sheet = options.out.with_suffix(".png")
    contact_sheet(sheet, generated[: options.rows], captions[: options.rows])
    console.print(f"{options.out} and {sheet}", soft_wrap=True)


if __name__ == "__main__":
    main()
