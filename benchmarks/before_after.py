"""An animation of videos before and after training, for a README.

    python -m benchmarks.before_after runs/demo --video 1 --video 8

Each chosen video of the evaluation has two columns, base and tuned. Below each video is its
difference from the previous frame, `GAIN` times enlarged.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dpo_video.data.video import read_video
from dpo_video.support.atomic import publishing

OUT = Path("docs/assets/before_after.gif")
GAIN = 6  # of the differences
ZOOM, LINE, GAP = 3, 20, 6  # factor, pixels, pixels
COLORS = 256  # of the palette that all frames share


def column(path: Path) -> UInt8[Tensor, "F h w 3"]:
    """Enlarged frames of a video, each above its difference from the previous frame."""
    frames = read_video(path).frames.permute(1, 2, 3, 0)  # F H W 3
    change = frames.float().diff(dim=0, prepend=frames[-1:].float()).abs()
    change[0] = 0
    both = torch.cat([frames, (GAIN * change).clamp(max=255).byte()], dim=1)
    return both.repeat_interleave(ZOOM, dim=1).repeat_interleave(ZOOM, dim=2)


def animation(run: Path, videos: list[int]) -> tuple[list[Image.Image], float]:
    """The frames, and the milliseconds that each is shown."""
    folder = run / "evaluation"
    prompts = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["prompts"]
    names = ("base", "tuned")
    paths = [folder / "videos" / f"{video:03d}-{name}.mp4" for video in videos for name in names]
    columns = [column(path) for path in paths]
    count, height, width, _ = columns[0].shape
    font = ImageFont.load_default(size=LINE - 8)
    background = Image.new("RGB", (len(columns) * (width + GAP) - GAP, 2 * LINE + height), "white")
    draw = ImageDraw.Draw(background)
    for index in range(len(columns)):
        left = index * (width + GAP)
        if index % 2 == 0:
            draw.text((left, 2), prompts[videos[index // 2]], fill="black", font=font)
        draw.text((left, LINE + 2), names[index % 2], fill="gray", font=font)
    frames = []
    for time in range(count):
        frame = background.copy()
        for index, pixels in enumerate(columns):
            frame.paste(Image.fromarray(pixels[time].numpy()), (index * (width + GAP), 2 * LINE))
        frames.append(frame)
    return frames, 1000 / read_video(paths[0]).fps


def shared_palette(frames: list[Image.Image]) -> Image.Image:
    """One palette for all frames, so that colors do not flicker between frames."""
    width, height = frames[0].size
    sheet = Image.new("RGB", (width, len(frames) * height))
    for index, frame in enumerate(frames):
        sheet.paste(frame, (0, index * height))
    return sheet.quantize(COLORS, method=Image.Quantize.MEDIANCUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="an evaluated run")
    parser.add_argument("--video", type=int, action="append", required=True, help="repeatable")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    frames, duration = animation(options.run, options.video)
    palette = shared_palette(frames)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with publishing(options.out) as partial:
        first.save(
            partial, format="GIF", save_all=True, append_images=others, duration=duration, loop=0
        )
    print(f"{options.out}: {options.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
