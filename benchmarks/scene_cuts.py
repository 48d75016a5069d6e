"""How many scene cuts are found, and how many are seen where there are none.

    python -m benchmarks.scene_cuts --clips CLIPS --cuts FILE --out results/VERSION

CLIPS holds videos at any depth. FILE is JSON with the known cuts of those that have some, by name:
`{"bikes.mp4": [30, 76]}`, the frames at which another scene begins. Videos are split there into
single shots, and shown to the detector as clips of 16 frames at 8, 16 and 24 frames a second and at
once, twice and four times the speed, which makes motion harder to tell from cuts.

- splices: two shots of different videos, joined at a random frame; found if that frame is named and
  no other.
- cuts: the known ones, inside a clip of the video as it is; found in the same sense.
- shots: clips of one shot; each with a cut in it is a false alarm.
- flashes: the same with one white frame inside.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, permutations
from pathlib import Path

import torch
from torch import Tensor

from dpo_video.data.folders import find_videos
from dpo_video.data.scene_cuts import find_cuts
from dpo_video.data.video import read_video

FRAMES = 16
RATES = (8, 16, 24)
SPEEDS = (1, 2, 4)
SPLICES = 2000


def shots_of(root: Path, cuts: dict[str, list[int]]) -> Iterator[tuple[str, Tensor, float, Tensor]]:
    """Video, one of its shots, the frame rate, and the whole video, for every shot."""
    for name in find_videos(root):
        footage = read_video(root / name, cover=(64, 64))
        video = footage.frames / 255.0
        edges = [0, *cuts.get(Path(name).name, []), video.shape[1]]
        for start, end in pairwise(edges):
            yield name, video[:, start:end], footage.fps, video


def at(video: Tensor, fps: float, rate: int, speed: int, start: int = 0) -> Tensor:
    """A clip of the video at a frame rate and a speed."""
    frames = (start + torch.arange(FRAMES) * fps * speed / rate).round().long()
    return video[:, frames[frames < video.shape[1]]]


def measure(root: Path, cuts: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    """Number of cases of each kind, and of those that the detector answers rightly."""
    shots, draw = list(shots_of(root, cuts)), random.Random(0)
    found: Counter[tuple[str, str]] = Counter()

    def count(kind: str, clip: Tensor, truth: list[int]) -> None:
        found[kind, "cases"] += 1
        found[kind, "right"] += find_cuts(clip) == truth

    for rate in RATES:
        for speed in SPEEDS:
            for _, shot, fps, _ in shots:
                step = max(1, round(FRAMES * fps * speed / rate))
                for start in range(0, shot.shape[1], step):
                    clip = at(shot, fps, rate, speed, start)
                    if clip.shape[1] < FRAMES // 2:
                        continue
                    count("shots", clip, [])
                    lit = clip.clone()
                    lit[:, clip.shape[1] // 2] = 1.0
                    count("flashes", lit, [])
    pairs = [(a, b) for a, b in permutations(shots, 2) if a[0] != b[0]]
    for one, other in draw.sample(pairs * 9, min(SPLICES, 9 * len(pairs))):
        rate, speed = draw.choice(RATES), draw.choice(SPEEDS)
        before, after = (at(part[1], part[2], rate, speed) for part in (one, other))
        cut = draw.randint(1, min(before.shape[1], FRAMES - 1))
        height, width = (min(part.shape[side] for part in (before, after)) for side in (2, 3))
        parts = [before[:, :cut, :height, :width], after[:, : FRAMES - cut, :height, :width]]
        count("splices", torch.cat(parts, dim=1), [cut])
    for name, video in {name: video for name, _, _, video in shots}.items():
        for frame in cuts.get(Path(name).name, []):
            for offset in (2, FRAMES // 2, FRAMES - 2):
                if frame >= offset:
                    clip = video[:, frame - offset : frame - offset + FRAMES]
                    count("cuts", clip, [offset])
    return {
        kind: {"cases": cases, "right": found[kind, "right"]}
        for (kind, what), cases in sorted(found.items())
        if what == "cases"
    }


def main() -> None:
    """Measure, print and write scene_cuts.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--cuts", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    cuts = json.loads(given.cuts.read_text()) if given.cuts else {}
    result = measure(given.clips, cuts)
    names = sorted(Path(name).name for name in find_videos(given.clips))
    text = json.dumps({"videos": names, "cuts": cuts, "result": result}, indent=1)
    print(text)
    if given.out:
        (given.out / "scene_cuts.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
