"""A still of videos before and after, for a README or a paper.

    python -m benchmarks.strip runs/NAME --video 1 --video 15 --out strip.png

Of every video of an evaluation: the base's frames, how much each differs from the frame before
(six times enlarged), and the same of the tuned model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dpo_video.data.video import read_video
from dpo_video.support.atomic import publishing

GAIN = 6.0  # of the differences
ZOOM, LINE, MARGIN = 2, 16, 60  # times, pixels, pixels


def rows(video: Float[Tensor, "3 F H W"]) -> list[Float[Tensor, "H w 3"]]:
    """Every second frame side by side, and below each what differs from the frame before."""
    change = (GAIN * video.diff(dim=1).abs()).clamp(0, 1)
    return [part.permute(2, 1, 3, 0).flatten(1, 2) for part in (video[:, 1::2], change[:, ::2])]


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run that was evaluated")
    parser.add_argument("--video", type=int, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    folder = options.run / "evaluation"
    prompts = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["prompts"]
    parts: list[tuple[str, Image.Image]] = []
    for number in options.video:
        for name in ("base", "tuned"):
            path = folder / "videos" / f"{number:03d}-{name}.mp4"
            for what, pixels in zip(
                (name, "change"), rows(read_video(path).frames / 255), strict=True
            ):
                image = Image.fromarray((255 * pixels).round().byte().numpy())
                size = (ZOOM * image.width, ZOOM * image.height)
                parts.append((what, image.resize(size, Image.Resampling.NEAREST)))
    width, height = parts[0][1].size
    group = LINE + 4 * (height + 2)
    sheet = Image.new("RGB", (MARGIN + width, group * len(options.video)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LINE - 4)
    for i, (what, image) in enumerate(parts):
        top = (i // 4) * group + LINE + (i % 4) * (height + 2)
        if i % 4 == 0:
            draw.text((MARGIN, top - LINE), prompts[options.video[i // 4]], fill="black", font=font)
        draw.text((4, top + height / 2 - LINE / 2), what, fill="black", font=font)
        sheet.paste(image, (MARGIN, top))
    with publishing(options.out) as partial:
        sheet.save(partial, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
