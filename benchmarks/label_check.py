"""Which side the labeler `metric` prefers: a clean clip or a degraded copy, and what people prefer.

    python -m benchmarks.label_check --clips CLIPS --human FOLDER --out results/VERSION

Writes `label_check.json` and `label_check.md`. Every clip (16 frames, whole clip as one segment) is
compared with degraded copies of itself at several sizes, by `warp_error` alone and with the vetoes
that are the default. FOLDER holds pairs of generated videos and `labels.jsonl` with what people
say of them (`first`, `second`, `visual_quality`); they are compared per second at 8 frames per
second and 96 pixels, and the majority of the seconds counts.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor

from benchmarks.rulers import relit_clips
from dpo_video.data.fitting import fit_video
from dpo_video.data.video import read_video
from dpo_video.labeler.metric import ByMetric, Measuring
from dpo_video.metric.dynamic_degree import DynamicDegree
from dpo_video.metric.new_frames import NewFrames
from dpo_video.metric.sharpness import Sharpness
from dpo_video.metric.warp_error import WarpError
from dpo_video.types import VideoShape

FRAMES, HUMAN_FPS, HUMAN_SIZE, HUMAN_SECONDS = 16, 8, 96, 4
METRICS = {
    "warp_error": WarpError(),
    "sharpness": Sharpness(),
    "dynamic_degree": DynamicDegree(),
    "new_frames": NewFrames(),
}
WORDS = {1: "clean", 0: "tie", -1: "degraded"}


def labelers() -> dict[str, Measuring]:
    """The labeler without vetoes, and as it is by default."""
    made = {}
    for name, rule in (("warp_error alone", ByMetric(guards={})), ("with vetoes", ByMetric())):
        labeler = rule.with_metrics({each: METRICS[each] for each in rule.metric_names})
        assert isinstance(labeler, Measuring)
        made[name] = labeler
    return made


# --- degradations, of videos [1 3 F H W] -------------------------------------------------------


def h264(video: Tensor, crf: int) -> Tensor:
    """Encoded by x264 at a constant rate factor, and decoded."""
    pixels = video[0].movedim(0, -1).mul(255).round().byte().contiguous().numpy()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": str(crf)}
        stream.codec_context.thread_count = 1
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as container:
        found = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    return torch.from_numpy(found).movedim(-1, 0)[None] / 255


def jpeg(video: Tensor, quality: int) -> Tensor:
    """Every frame as a JPEG."""
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality]
    pixels = video[0].movedim(0, -1).mul(255).round().byte().contiguous().numpy()
    found = []
    for picture in pixels:
        decoded = cv2.imdecode(cv2.imencode(".jpg", picture, flags)[1], cv2.IMREAD_COLOR)
        assert decoded is not None
        found.append(decoded)
    return torch.from_numpy(np.stack(found)).movedim(-1, 0)[None] / 255


def blur(video: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of every frame."""
    window = 2 * round(3 * sigma) + 1
    frames = video[0].transpose(0, 1)
    soft = gaussian_blur2d(frames, (window, window), (sigma, sigma), border_type="replicate")
    return soft.transpose(0, 1)[None]


def noise(video: Tensor, sigma: float) -> Tensor:
    """White noise, independent per frame."""
    generator = torch.Generator().manual_seed(1)
    return (video + sigma * torch.randn(video.shape, generator=generator)).clamp(0, 1)


def repeated(video: Tensor) -> Tensor:
    """Every second frame is dropped, and the one before it shown twice."""
    return video[:, :, ::2].repeat_interleave(2, dim=2)


def slowed(video: Tensor) -> Tensor:
    """The first half at half the speed; frames between two are their mean."""
    frames = video[:, :, : video.shape[2] // 2]
    between = (frames + torch.cat([frames[:, :, 1:], frames[:, :, -1:]], dim=2)) / 2
    return torch.stack([frames, between], dim=3).flatten(2, 3)


DEGRADATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "flicker: soft patches of light of 15%": lambda video: relit_clips(video, "white"),
    "noise of 5%": lambda video: noise(video, 0.05),
    "blur, sigma 0.7 pixels": lambda video: blur(video, 0.7),
    "blur, sigma 1.5 pixels": lambda video: blur(video, 1.5),
    "H.264, crf 35": lambda video: h264(video, 35),
    "H.264, crf 45": lambda video: h264(video, 45),
    "JPEG, quality 30": lambda video: jpeg(video, 30),
    "every second frame dropped": repeated,
    "half the speed": slowed,
    "frozen": lambda video: video[:, :, :1].expand_as(video),
}


def clip(path: Path, size: int) -> Tensor:
    """The first frames of a clip `[1 3 F H W]`, of even sides, the shorter one of `size`."""
    start = 1.0 if path.stem == "grand_prix_1906" else 0.0  # after the titles
    frames = read_video(path, start=start, frames=FRAMES).frames / 255
    height, width = frames.shape[-2:]
    sides = [2 * round(size * side / min(height, width) / 2) for side in (height, width)]
    scaled = F.interpolate(frames.transpose(0, 1), sides, mode="bilinear", antialias=True)
    return scaled.transpose(0, 1)[None].clamp(0, 1)


def measure(videos: list[Tensor]) -> dict[str, Tensor]:
    """The metrics of videos of one shape, one number a video."""
    batch = torch.cat(videos)
    return {name: metric(batch, [""] * len(batch)) for name, metric in METRICS.items()}


def degraded_rows(path: Path, size: int, judges: dict[str, Measuring]) -> list[dict[str, Any]]:
    """A row per degradation of one clip: the values, and what each labeler says."""
    video = clip(path, size)
    values = measure([video, *(degrade(video) for degrade in DEGRADATIONS.values())])
    pairs = {name: (found[:1].expand_as(found[1:]), found[1:]) for name, found in values.items()}
    labels = {judge: labeler.decide(pairs, pairs)[0] for judge, labeler in judges.items()}
    return [
        {
            "clip": path.stem, "size": size, "degradation": name,
            "clean": {metric: found[0].item() for metric, found in values.items()},
            "degraded": {metric: found[i + 1].item() for metric, found in values.items()},
            **{judge: WORDS[int(found[i])] for judge, found in labels.items()},
        }
        for i, name in enumerate(DEGRADATIONS)
    ]  # fmt: skip


def human_rows(folder: Path, judges: dict[str, Measuring]) -> list[dict[str, Any]]:
    """A row per pair with labels from people."""
    rows, count = [], HUMAN_FPS * HUMAN_SECONDS
    shape = VideoShape(frames=count, height=HUMAN_SIZE, width=HUMAN_SIZE * 5 // 3, fps=HUMAN_FPS)
    for line in (folder / "labels.jsonl").read_text().splitlines():
        entry, sides = json.loads(line), []
        for side in ("first", "second"):
            footage = read_video(folder / entry[side])
            video = fit_video(footage.frames, footage.fps, shape)[None]
            sides.append(measure(list(video.split(HUMAN_FPS, dim=2))))
        pairs = {name: (sides[0][name], sides[1][name]) for name in METRICS}
        row = {
            "pair": Path(entry["first"]).stem.removesuffix("_A"),
            "people": entry["visual_quality"],
            "first": {name: first.tolist() for name, (first, _) in pairs.items()},
            "second": {name: second.tolist() for name, (_, second) in pairs.items()},
        }
        for judge, labeler in judges.items():
            seconds = labeler.decide(pairs, pairs)[0]
            row[judge] = {1: "first", 0: "tie", -1: "second"}[int(seconds.sum().sign())]
            row[f"{judge}, seconds"] = seconds.tolist()
        rows.append(row)
    return rows


def as_tables(rows: list[dict[str, Any]], people: list[dict[str, Any]]) -> str:
    """Markdown: how often the clean clip is preferred / a tie / the degraded copy is preferred."""
    judges = list(labelers())
    sizes = sorted({row["size"] for row in rows})
    heads = [f"{judge}, {size} px" for judge in judges for size in sizes]
    lines = [f"| clean against | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name in DEGRADATIONS:
        cells = []
        for judge in judges:
            for size in sizes:
                words = [
                    row[judge] for row in rows if row["size"] == size and row["degradation"] == name
                ]
                cells.append(" / ".join(str(words.count(word)) for word in WORDS.values()))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if people:
        lines += ["", f"| pair | people | {' | '.join(judges)} |", "|---|---|---|---|"]
        lines += [f"| {row['pair']} | {row['people']} | {' | '.join(row[j] for j in judges)} |"
                  for row in people]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=Path, required=True, help="folder of real clips (*.mp4)")
    parser.add_argument("--human", type=Path, help="folder of pairs with labels.jsonl")
    parser.add_argument("--sizes", type=int, nargs="+", default=[48, 96], help="shorter side")
    parser.add_argument("--out", type=Path, help="folder of label_check.json, label_check.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, judges, rows = time.process_time(), labelers(), []
    people = human_rows(options.human, judges) if options.human else []
    for path in sorted(options.clips.glob("*.mp4")):
        for size in options.sizes:
            rows += degraded_rows(path, size, judges)
            print(path.stem, size, f"{time.process_time() - start:.0f} s", flush=True)
    text = as_tables(rows, people)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        found = {"degraded": rows, "people": people}
        (options.out / "label_check.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "label_check.md").write_text(text)


if __name__ == "__main__":
    main()
