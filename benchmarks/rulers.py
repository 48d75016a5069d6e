"""What the optical flows and dynamic_degree read on traps whose truth is known.

    python -m benchmarks.rulers --clips CLIPS --stereo FOLDER --out results/VERSION

Writes `rulers.json` and `rulers.md`: a row per trap and ruler, with what it reads, what is true and
whether the law of the trap holds. Seconds are of one core.

- still: textures that do not move under a light that changes, or under grain. The warping error is
  compared with that of the true flow, 0.
- flat: still scenes of `tiny`, which have no texture, under the flicker that `tiny` learned.
- motion: textures that shift, turn and grow under the same light; endpoint error in pixels.
- uncovered: a textured square moves over a texture; share of what it uncovers that is masked.
- stereo: a pair of photographs with true disparities. FOLDER holds `motorcycle_left.png`,
  `motorcycle_right.png` and `motorcycle_disp.npz` (Middlebury 2014, as in `skimage/data` of the
  scikit-image 0.16.2 wheel).
- speed: every frame of a clip against every second one; dynamic_degree should halve, unless the
  motion changes from frame to frame. Means over windows of 16 frames, behind titles and between
  cuts.
- camera: the same by the shift between whole frames (phase correlation), for each window of the
  clips whose camera moves: 0.5 where it moves steadily, and more where it trembles.
- mosaic: four mirrored copies of a clip at half its size against the clip. Every motion is half.
- bait: a lit clip against the clean one at half the speed, which must not read as equal motion.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor

from benchmarks.tiny.recipe import flicker
from dpo_video.data.video import read_video
from dpo_video.metric._flow import visible, warp
from dpo_video.metric._flow_methods import FlowMethod, flow_between
from dpo_video.metric.dynamic_degree import DynamicDegree
from dpo_video.metric.warp_error import WarpError
from dpo_video.tiny.scenes import draw_scenes, render

LIGHTS = ("global", "white", "coloured", "grain")
SIZES = (64, 128, 256)
WINDOWS = {  # first frames of the windows of the clips; 0 for others
    "dog": (0, 12, 25),
    "grand_prix_1906": (15, 31, 47, 63),
    "puck_constant_force": (3, 10),
    "thrown_ball": (2, 30, 60, 90),
}
HANDHELD = ("dog", "grand_prix_1906")
UNCOVERED = ((1, 0), (2, 1), (4, 2), (8, 3))
Estimate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One reading of one ruler on one trap."""

    trap: str
    ruler: str
    reads: float
    truth: float
    low: float
    """Bounds of the law; infinite where there is none."""
    high: float
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the reading keeps the law."""
        return self.low <= self.reads <= self.high


# --- traps -----------------------------------------------------------------------------------


def texture(size: int, seed: int = 0) -> Tensor:
    """Noise with structure at several scales, as in photographs: `[1 3 size size]`."""
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 0.5
    layers = [s * gaussian_blur2d(noise, (t, t), (s, s)) for s, t in ((1.5, 7), (4, 17), (10, 41))]
    return (0.5 + 0.8 * torch.stack(layers).sum(0)).clamp(0, 1)


def relight(frames: Tensor, light: str, seed: int) -> Tensor:
    """`[n 3 H W]` under a light of its own per frame, or under grain.

    `global` is one gain of 5% standard deviation; `white` and `coloured` are gains of 15% in soft
    patches of a quarter of the picture, for all channels or for each; `grain` is 0.05.
    """
    generator = torch.Generator().manual_seed(seed)
    count, channels, height, width = frames.shape
    if light == "global":
        return (frames * (1 + 0.05 * torch.randn(count, 1, 1, 1, generator=generator))).clamp(0, 1)
    if light == "grain":
        return (frames + 0.05 * torch.randn(frames.shape, generator=generator)).clamp(0, 1)
    if light == "none":
        return frames
    colours = channels if light == "coloured" else 1
    patches = torch.randn(count, colours, 4, 4, generator=generator)
    gain = F.interpolate(patches, size=(height, width), mode="bicubic")
    return (frames * (1 + 0.15 * gain)).clamp(0, 1)


def still(size: int, light: str, count: int = 4) -> tuple[Tensor, Tensor]:
    """Textures in two lights: `[n 3 size size]` each."""
    frames = torch.cat([texture(size, seed) for seed in range(count)])
    return relight(frames, light, seed=11), relight(frames, light, seed=12)


def flat(count: int = 16) -> tuple[Tensor, Tensor]:
    """Scenes of `tiny` in two lights of its flicker: `[n 3 64 64]` each."""
    scenes = render(draw_scenes(count, torch.Generator().manual_seed(0)))[:, 0]
    gains = flicker(count, torch.Generator().manual_seed(1))
    middle = gains.shape[1] // 2
    first, second = ((scenes * gains[:, t]).clamp(0, 1) for t in (middle, middle + 1))
    lit = (first - second).square().mean(dim=(1, 2, 3)) > 1e-4  # flicker comes and goes
    return first[lit], second[lit]


def moving(size: int, light: str, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Textures that shift, turn and grow, in two lights, and the true flow."""
    wide = size + 40  # what enters the picture has a texture too
    frames = torch.cat([texture(wide, seed) for seed in range(count)])
    axis = torch.arange(wide) - (wide - 1) / 2
    here = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))
    shift = torch.tensor([1.3, -0.7]).view(2, 1, 1)
    cos, sin = 1.01 * math.cos(0.02), 1.01 * math.sin(0.02)
    matrix = torch.tensor([[cos, -sin], [sin, cos]])
    flow = torch.einsum("ij,jhw->ihw", matrix, here) + shift - here
    back = torch.einsum("ij,jhw->ihw", matrix.inverse(), here - shift) - here
    second = warp(frames, back.expand(count, -1, -1, -1))
    inner = (..., slice(20, -20), slice(20, -20))
    lit = relight(frames[inner], light, seed=21), relight(second[inner], light, seed=22)
    return *lit, flow[inner].expand(count, -1, -1, -1)


def uncovering(motion: tuple[int, int], size: int = 96) -> tuple[Tensor, Tensor, Tensor]:
    """A square that moves over a texture, and the mask of what it uncovers."""
    right, down = motion
    ground, square = texture(size), texture(size, seed=7)
    side, top = size // 2, size // 4
    first, second = ground.clone(), ground.clone()
    before = (..., slice(top, top + side), slice(top, top + side))
    after = (..., slice(top + down, top + down + side), slice(top + right, top + right + side))
    first[before], second[after] = square[..., :side, :side], square[..., :side, :side]
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[before], mask[after] = True, False
    return first, second, mask


def stereo(folder: Path, scale: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two photographs at a fraction of their size, the true flow, and where it is known."""
    import cv2
    import numpy as np

    pictures = []
    for side in ("left", "right"):
        pixels = cv2.imread(str(folder / f"motorcycle_{side}.png"))[..., ::-1].copy()
        pictures.append(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    disparity = torch.from_numpy(np.load(folder / "motorcycle_disp.npz")["arr_0"])[None, None]
    height, width = (side // scale for side in disparity.shape[-2:])
    known = disparity.isfinite()
    disparity = torch.where(known, disparity, 0) * (width / disparity.shape[-1])
    disparity, valid = (F.interpolate(x.float(), (height, width)) for x in (disparity, known))
    first, second = (
        F.interpolate(x, (height, width), mode="bilinear", antialias=True) for x in pictures
    )
    flow = torch.cat([-disparity, torch.zeros_like(disparity)], dim=1)
    return first, second, flow, valid[:, 0] > 0


def relit_clips(videos: Tensor, light: str) -> Tensor:
    """Clips `[b 3 F H W]` under a light of its own in every frame."""
    lit = [relight(video.transpose(0, 1), light, 4 + n) for n, video in enumerate(videos)]
    return torch.stack(lit).transpose(1, 2)


def mosaic(videos: Tensor) -> Tensor:
    """Four mirrored copies of `[b 3 F H W]` at half the size."""
    frames = videos.transpose(1, 2)
    height, width = (side // 2 for side in frames.shape[-2:])
    small = F.interpolate(
        frames.flatten(0, 1), (height, width), mode="bilinear", antialias=True
    ).unflatten(0, frames.shape[:2])
    row = torch.cat([small, small.flip(-1)], dim=-1)
    return torch.cat([row, row.flip(-2)], dim=-2).transpose(1, 2)


# --- readings --------------------------------------------------------------------------------


def warp_error_ratio(flow: FlowMethod, first: Tensor, second: Tensor, raft: str = "") -> Tensor:
    """The warping error over that of the true flow of a still picture, one number a video."""
    true = 255**2 * (first - second).square().mean(dim=(1, 2, 3))
    videos = torch.stack([first, second], dim=2)
    return WarpError(flow=flow, raft_weights=raft)(videos, []) / true


def endpoint_error(flow: Tensor, truth: Tensor) -> float:
    """Mean distance from the true flow, in pixels, without the border of 8."""
    return float((flow - truth).norm(dim=1)[:, 8:-8, 8:-8].mean())


def masked_shares(estimate: Estimate, motion: tuple[int, int]) -> tuple[float, float]:
    """Masked share of what a square uncovers, and of all other pixels."""
    first, second, uncovered = uncovering(motion)
    masked = ~visible(estimate(second, first), estimate(first, second))[0, 0]
    return float(masked[uncovered].float().mean()), float(masked[~uncovered].float().mean())


def flow_rows(flow: FlowMethod, raft: str, folder: Path | None) -> Iterator[Row]:
    """The readings of one optical flow."""

    def estimate(first: Tensor, second: Tensor) -> Tensor:
        return flow_between(flow, first, second, raft_weights=raft)

    def row(trap: str, truth: float, low: float, high: float, read: Callable[[], float]) -> Row:
        start = time.process_time()
        value = read()
        return Row(trap, flow, value, truth, low, high, time.process_time() - start)

    for light in LIGHTS:
        for size in SIZES:
            pair = still(size, light)
            low = 0.95
            if light == "grain":
                low = float(warp_error_ratio("farneback", *pair).mean())
            yield row(
                f"still, {light}, {size} px: warp_error / true", 1, low, 1.05,
                lambda pair=pair: float(warp_error_ratio(flow, *pair, raft).mean()),
            )  # fmt: skip
    yield row(
        "flat, flicker, 64 px: warp_error / true", 1, 0.95, 1.05,
        lambda: float(warp_error_ratio(flow, *flat(), raft).mean()),
    )  # fmt: skip
    for size in SIZES:
        first, second, truth = moving(size, "none")
        clean = endpoint_error(estimate(first, second), truth)
        for light in ("none", *LIGHTS):
            first, second, truth = moving(size, light)
            high = math.inf if light in ("none", "grain") else 2 * clean
            yield row(
                f"motion, {light}, {size} px: endpoint error", 0, 0, high,
                lambda a=first, b=second, t=truth: endpoint_error(estimate(a, b), t),
            )  # fmt: skip
    for motion in UNCOVERED:
        start = time.process_time()
        inside, others = masked_shares(estimate, motion)
        seconds = time.process_time() - start
        name = f"uncovered by ({motion[0]}, {motion[1]}) px: share masked"
        yield Row(name, flow, inside, 1, 0.9 if motion >= (2, 1) else 0, 1, seconds)
        yield Row(f"{name} of the others", flow, others, 0, 0, 0.1, seconds)
    for scale in (1, 2, 4, 8) if folder is not None else ():
        assert folder is not None
        first, second, truth, known = stereo(folder, scale)
        by_dis = (flow_between("dis", first, second) - truth).norm(dim=1)[known]
        start = time.process_time()
        error = (estimate(first, second) - truth).norm(dim=1)[known]
        seconds = time.process_time() - start
        size = "x".join(str(side) for side in reversed(first.shape[-2:]))
        for name, read in (("mean", Tensor.mean), ("median", Tensor.median)):
            yield Row(
                f"stereo, {size}: {name} endpoint error", flow, float(read(error)), 0, 0,
                float(read(by_dis)), seconds,
            )  # fmt: skip


def windows(path: Path) -> Tensor:
    """The windows of a clip, `[b 3 16 H W]`."""
    frames = read_video(path).frames / 255
    return torch.stack([frames[:, at : at + 16] for at in WINDOWS.get(path.stem, (0,))])


def camera_rows(clips: Path) -> Iterator[Row]:
    """How much slower the camera of real clips is with every frame than with every second one."""
    for name in HANDHELD:
        for start, video in zip(WINDOWS[name], windows(clips / f"{name}.mp4"), strict=True):
            begin = time.process_time()
            ratio = camera_speed(video) / camera_speed(video[:, ::2])
            seconds = (time.process_time() - begin) / 2
            trap = f"camera, {name} from frame {start}: slow / fast"
            yield Row(trap, "registration", ratio, 0.5, 0, math.inf, seconds)


def camera_speed(video: Tensor) -> float:
    """Mean shift between consecutive frames of `[3 F H W]` as a whole, in pixels."""
    import cv2

    window = cv2.createHanningWindow((video.shape[-1], video.shape[-2]), cv2.CV_64F)
    frames = [frame.numpy() for frame in video.mean(0).double()]
    pairs = list(itertools.pairwise(frames))
    return sum(math.hypot(*cv2.phaseCorrelate(a, b, window)[0]) for a, b in pairs) / len(pairs)


def speed_rows(flow: FlowMethod, raft: str, clips: Path, sizes: tuple[int, ...]) -> Iterator[Row]:
    """The readings of dynamic_degree on real clips and on the same at half the motion."""
    ruler = f"dynamic_degree, {flow}"
    for path in sorted(clips.glob("*.mp4")):
        video = windows(path)
        for size in sizes:
            degree = DynamicDegree(flow=flow, raft_weights=raft, size=size)
            begin = time.process_time()
            read, half = {}, {}
            for light in ("none", "white", "coloured"):
                lit, small = relit_clips(video, light), relit_clips(mosaic(video), light)
                read[light] = [float(degree(v, []).mean()) for v in (lit, lit[:, :, ::2], small)]
                half[f"speed, light {light}"] = read[light][:2]
                half[f"mosaic, light {light}"] = [read[light][2], read[light][0]]
            seconds = (time.process_time() - begin) / 9 / len(video)
            bait = {
                f"bait, light {light}": [read["none"][0], fast]
                for light, (_, fast, _) in read.items()
                if light != "none"
            }
            for trap, (above, below) in (half | bait).items():
                bounds = (0.45, 0.55) if trap in half else (0, 0.9)
                ratio = above / below if below else math.nan
                name = f"{trap}, {path.stem}, {size} px: slow / fast"
                yield Row(name, ruler, ratio, 0.5, *bounds, seconds)


# --- report ----------------------------------------------------------------------------------


def as_table(rows: list[Row]) -> str:
    """Markdown: a line per trap, a column per ruler; what breaks a law is bold."""
    rulers = list(dict.fromkeys(row.ruler for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        read = f"{row.reads:.3f}" if row.holds else f"**{row.reads:.3f}**"
        cells.setdefault(row.trap, {"true": f"{row.truth:g}"})[row.ruler] = read
    lines = [f"| trap | true | {' | '.join(rulers)} |", "|---|---|" + "---|" * len(rulers)]
    for trap, cell in cells.items():
        lines.append(
            f"| {trap} | {cell['true']} | {' | '.join(cell.get(name, '') for name in rulers)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=Path, help="folder of real clips (*.mp4)")
    parser.add_argument("--stereo", type=Path, help="folder of the stereo pair")
    parser.add_argument(
        "--raft", default="", help="torchvision's RAFT weights, to measure RAFT too"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[128], help="of dynamic_degree")
    parser.add_argument("--flows", nargs="+", default=["lucas_kanade", "dis", "farneback"])
    parser.add_argument("--out", type=Path, required=True, help="folder of rulers.json, rulers.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flows = [*options.flows, *(["raft"] if options.raft else [])]
    rows: list[Row] = []
    for flow in flows:
        for row in flow_rows(flow, options.raft, options.stereo):
            print(f"{row.trap} by {row.ruler}: {row.reads:.3f} ({row.seconds:.2f} s)", flush=True)
            rows.append(row)
    if options.clips:
        rows.extend(camera_rows(options.clips))
    for flow in flows if options.clips else ():
        for row in speed_rows(flow, options.raft, options.clips, tuple(options.sizes)):
            print(f"{row.trap} by {row.ruler}: {row.reads:.3f} ({row.seconds:.2f} s)", flush=True)
            rows.append(row)
    options.out.mkdir(parents=True, exist_ok=True)
    found = [{**asdict(row), "holds": row.holds} for row in rows]
    text = json.dumps(found, indent=1).replace("Infinity", "null").replace("NaN", "null")
    (options.out / "rulers.json").write_text(text + "\n")
    (options.out / "rulers.md").write_text(as_table(rows))


if __name__ == "__main__":
    main()
