"""Dynamic degree: speed of what moves, robust to flicker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from dpo_video.errors import UserError
from dpo_video.metric._flow import blur, dense_flow, even_light, halve, warp
from dpo_video.metric._flow_methods import FlowMethod, flow_between, second_flow
from dpo_video.paths import LocalPath
from dpo_video.strategies import Metric
from dpo_video.types import PerPair, Videos

ACCEPTANCE = 0.6  # a path is accepted if it lowers the mismatch to this share
TESTABLE = 5  # frames: the paths of shorter videos are too short for the tests
EDGE = (
    1.5  # pixels at half the resolution: nearer to the edge, half of the flow's window is outside
)
PIXELS = 1 << 20  # of the frame pairs that are matched at once
SHORT = 2  # frames before and after the anchor of the shorter window
CAMERA = 0.01  # significance level of the test that the camera moves and does not just tremble


@final
class DynamicDegree(Metric):
    """Dynamic degree: speed of what moves, robust to flicker, in % of the diagonal per frame.

    After VBench's dynamic degree (Huang et al. 2023, arXiv 2311.17982): the fastest 5% of the
    picture count, so that a small object on a still background is not averaged away. VBench uses
    the flow of consecutive frames, in which flicker looks like motion. Here the light is taken out
    of the frames, every pixel of some anchor frames is tracked directly to each of the surrounding
    frames, and a line is fitted to its path. The slope of the line is motion; its residual is
    flicker. Pixels whose slope is not significant against the residual (an F-test) count as still,
    and twice the variance that noise adds is subtracted from the squared speed of the others
    (twice, because the largest of many equal speeds are those with the largest errors):

    `100 / diagonal * sqrt(mean over anchors and the fastest pixels of |speed|^2 - 2 variance)`

    A line must also predict the frames on both sides of the anchor much better than no motion does;
    no line does so across a leap from one place to another. Where the line over the whole window
    fails, as it does for fast objects and curved paths, a line over five frames or a parabola can
    stand in for it.

    The median over the picture is the motion of the camera. What it does beside its line is no
    residual, so that a trembling camera does not hide what moves. Where its line is not significant
    against its own residual, the camera trembles, and speeds are relative to it.

    Limits: an object smaller than `share` of the picture counts by the root of its area; an
    object that moves a tenth of the picture per frame is lost; the trembling of the camera does
    not count; other motion that changes direction from frame to frame, stops and goes, or is
    interrupted by a leap counts in part or not at all; the spin of a flat disc is not seen; flicker
    slower than the window looks like motion; grain as strong as the picture's contrast hides slow
    motion; videos of fewer than 5 frames are too short for the tests, and their flicker counts as
    motion.
    """

    higher_is_better: ClassVar[bool] = True
    role: ClassVar[Literal["target", "motion", "guard"]] = "motion"
    unit: ClassVar[str] = "% of diagonal / frame"

    share: float = Field(default=0.05, gt=0, le=1)
    """Share of the picture, by speed, that counts (VBench: 5%)."""
    radius: int = Field(default=4, ge=2)
    """Frames before and after the anchor frame that a pixel is tracked to."""
    significance: float = Field(default=1e-4, gt=0, lt=1)
    """Significance level of the test that a pixel moves: the false positive rate of flicker."""
    size: int = Field(default=128, ge=16)
    """Shorter side, in pixels, that larger videos are resized to."""
    flow: FlowMethod = "lucas_kanade"
    """Optical flow; `dis`, `farneback` (OpenCV) and `raft` (torchvision) are second opinions."""
    raft_weights: LocalPath = ""
    """Path of torchvision's RAFT weights, for `raft`."""

    def witness(self) -> tuple[str, Metric]:
        """The same metric by a second optical flow."""
        name, flow = second_flow(self.flow)
        return name, self.model_copy(update={"flow": flow})

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One value per video; UserError for videos of a single frame."""
        frames = videos.shape[2]
        if frames < 2:
            raise UserError(
                "dynamic_degree tracks pixels from frame to frame, and these videos have only "
                "one. Use videos of 2 frames or more."
            )
        videos = self._prepare(videos.float())
        back, forth = self._flows(videos)
        half = halve(videos[..., : videos.shape[-2] // 2 * 2, : videos.shape[-1] // 2 * 2])
        count = math.ceil(frames / SHORT)
        anchors = [int((index + 0.5) * frames / count) for index in range(count)]
        paths = {anchor: _paths(back, forth, anchor, self.radius) for anchor in anchors}
        if self.flow == "lucas_kanade":
            paths = _rematch(videos, paths)
        speeds = []
        for anchor, path in paths.items():
            squared = self._squared_speed(half, path, anchor)
            fastest = max(1, round(self.share * squared[0].numel()))
            speeds.append(squared.flatten(1).topk(fastest, dim=1).values.mean(1).sqrt())
        return torch.stack(speeds).mean(0) * (100 / math.hypot(*videos.shape[-2:]))

    def _prepare(self, videos: Videos) -> Float[Tensor, "b 3 F h w"]:
        """Shrink to `size`, which is enough for tracking and has less noise, and even the light."""
        frames = videos.transpose(1, 2).flatten(0, 1)
        scale = self.size / min(videos.shape[-2:])
        if scale < 1:
            frames = F.interpolate(
                frames,
                size=[round(side * scale) for side in videos.shape[-2:]],
                mode="bilinear",
                antialias=True,
                align_corners=False,
            )
        return even_light(frames).unflatten(0, (len(videos), -1)).transpose(1, 2)

    def _flows(
        self, videos: Float[Tensor, "b 3 F H W"]
    ) -> tuple[Float[Tensor, "b t 2 h w"], Float[Tensor, "b t 2 h w"]]:
        """Flows of every frame but the first to the previous, and of all but the last to the next.

        In pixels, at half the resolution, which is enough over several frames.
        """
        frames = videos.transpose(1, 2)
        before, after = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)
        flows = []
        for first, second in ((after, before), (before, after)):
            if self.flow == "lucas_kanade":
                flow = dense_flow(first, second, finest=1)
            else:
                flow = flow_between(self.flow, first, second, raft_weights=self.raft_weights)
            height, width = (side // 2 * 2 for side in flow.shape[-2:])
            flows.append(halve(flow[..., :height, :width]).unflatten(0, (len(videos), -1)))
        return flows[0], flows[1]

    def _squared_speed(
        self, videos: Float[Tensor, "b 3 F h w"], path: dict[int, Tensor], anchor: int
    ) -> Float[Tensor, "b h w"]:
        """Squared speed of the pixels of one frame, in pixels per frame; 0 for still ones."""
        if videos.shape[2] < TESTABLE:
            return _fit(path, 1, 1.0)[1]
        squared = torch.zeros_like(path[0][:, 0])
        short = {k: path[k] for k in _window(anchor, videos.shape[2], SHORT)}
        centred = {k: value for k, value in path.items() if abs(k) <= self.radius}
        # The more closely a curve can follow noise, the more it takes to convince. Near the first
        # and the last frame, the centred window can be too short for a curve.
        for points, degree, exponent in (
            (short, 1, 1.5), (centred, 2, 1.5), (centred, 1, 1.0), (path, 2, 1.5),
        ):  # fmt: skip
            if len(points) < degree + 2:
                continue
            curve, value = _fit(points, degree, self.significance**exponent)
            value = torch.where(_explains(curve, videos, anchor) & _inside(curve), value, 0)
            squared = torch.where(squared > 0, squared, value)
        return squared


def _fit(
    path: dict[int, Float[Tensor, "b 2 h w"]], degree: int, chance: float
) -> tuple[dict[int, Float[Tensor, "b 2 h w"]], Float[Tensor, "b h w"]]:
    """Polynomials in time fitted to paths, and the squared speed at the anchor minus its variance.

    In pixels, and pixels per frame; the square is 0 where the speed is not significant. Speeds are
    relative to the camera where the camera only trembles.
    """
    points = torch.stack(list(path.values()), dim=1)
    time = points.new_tensor(list(path))
    design = torch.stack([time**power for power in range(degree + 1)], dim=1)
    inverse = (design.T @ design).inverse()
    coefficients = torch.einsum("pk,nkchw->npchw", inverse @ design.T, points)
    fitted = torch.einsum("kp,npchw->nkchw", design, coefficients)
    curve = {k: fitted[:, i] - coefficients[:, 0] for i, k in enumerate(path)}
    speed = coefficients[:, 1]
    if chance == 1:
        return curve, speed.square().sum(1)
    residual = points - fitted
    shake = residual.flatten(3).median(-1).values[..., None, None]
    camera = speed.flatten(2).median(-1).values[..., None, None]
    freedom = 2 * (len(path) - degree - 1)

    def variance(residual: Tensor) -> Tensor:
        """Of the speed of what does not move."""
        return residual.square().sum(dim=(1, 2)) / (freedom / 2) * inverse[1, 1]

    def critical(chance: float) -> float:
        """Quantile of the F distribution with 2 and `freedom` degrees, in closed form."""
        return freedom / 2 * (chance ** (-2 / freedom) - 1)

    pans = camera.square().sum(1, keepdim=True) > critical(CAMERA) * variance(shake)[:, None]
    squared = (speed - torch.where(pans, 0, camera)).square().sum(1)
    noise = variance(residual - shake)
    # Twice: see the class.
    return curve, torch.where(squared > critical(chance) * noise, squared - 2 * noise, 0)


def _window(anchor: int, frames: int, radius: int) -> range:
    """Offsets of the `2 * radius + 1` frames nearest to the anchor, fewer in shorter videos."""
    first = max(0, min(anchor - radius, frames - 2 * radius - 1))
    return range(first - anchor, min(first + 2 * radius + 1, frames) - anchor)


def _paths(
    back: Float[Tensor, "b t 2 h w"], forth: Float[Tensor, "b t 2 h w"], anchor: int, radius: int
) -> dict[int, Float[Tensor, "b 2 h w"]]:
    """Displacement of each pixel of the anchor frame in the frames around it, in pixels.

    Flows are followed from frame to frame. What flicker moves in one frame it takes back in the
    next, so that errors by flicker do not accumulate.
    """
    origin = torch.zeros_like(forth[:, 0])
    path = {0: origin}
    window = _window(anchor, forth.shape[1] + 1, radius)
    for step, flows in ((-1, back), (1, forth)):
        for offset in range(step, window[-1] + 1 if step > 0 else window[0] - 1, step):
            index = anchor + offset - (step > 0)
            # `back` has the flow of frame t at t - 1, `forth` at t.
            last = path[offset - step]
            path[offset] = last + warp(flows[:, index], last / 2)
    return dict(sorted(path.items()))


def _rematch(
    videos: Float[Tensor, "b 3 F H W"], paths: dict[int, dict[int, Float[Tensor, "b 2 h w"]]]
) -> dict[int, dict[int, Float[Tensor, "b 2 h w"]]]:
    """`paths` of the anchor frames after matching each with the frames around it directly."""
    matched = {anchor: dict(path) for anchor, path in paths.items()}
    pairs = [(anchor, offset) for anchor, path in paths.items() for offset in path if offset]
    frames = videos.transpose(1, 2)
    height, width = (2 * side for side in paths[pairs[0][0]][0].shape[-2:])
    # Many frame pairs at once: on small videos one call for each takes four times as long.
    size = max(1, PIXELS // videos[:, 0, 0].numel())
    for some in (pairs[at : at + size] for at in range(0, len(pairs), size)):
        first = frames[:, [anchor for anchor, _ in some]].flatten(0, 1)
        second = frames[:, [anchor + offset for anchor, offset in some]].flatten(0, 1)
        path = torch.stack([paths[anchor][offset] for anchor, offset in some], 1).flatten(0, 1)
        start = F.interpolate(path, size=videos.shape[-2:], mode="bilinear")
        flow = dense_flow(first, second, start=start, levels=2, finest=1)
        flow = halve(flow[..., :height, :width]).unflatten(0, (len(videos), -1))
        for index, (anchor, offset) in enumerate(some):
            matched[anchor][offset] = flow[:, index]
    return matched


def _inside(curve: dict[int, Float[Tensor, "b 2 h w"]]) -> Bool[Tensor, "b h w"]:
    """Whether a curve stays inside the picture, where the flow is more than a guess."""
    displacement = torch.stack(list(curve.values()), dim=1) / 2
    height, width = displacement.shape[-2:]
    x = torch.arange(width).to(displacement) + displacement[:, :, 0]
    y = torch.arange(height).to(displacement)[:, None] + displacement[:, :, 1]
    inside = (x >= EDGE) & (x <= width - 1 - EDGE) & (y >= EDGE) & (y <= height - 1 - EDGE)
    return inside.all(dim=1)


def _explains(
    curve: dict[int, Float[Tensor, "b 2 h w"]], videos: Float[Tensor, "b 3 F h w"], anchor: int
) -> Bool[Tensor, "b h w"]:
    """Whether a curve predicts both the frames before the anchor and those after it.

    No smooth curve predicts both sides of a leap.
    """
    accepted = torch.ones_like(videos[:, 0, 0], dtype=torch.bool)
    for side in ([k for k in curve if k < 0], [k for k in curve if k > 0]):
        if not side:
            continue
        others = videos[:, :, [anchor + offset for offset in side]].transpose(1, 2)
        frame = videos[:, None, :, anchor].expand_as(others).flatten(0, 1)
        others = others.flatten(0, 1)
        motion = torch.stack([curve[offset] for offset in side], 1).flatten(0, 1) / 2
        moving, still = (
            _mismatch(frame, other).unflatten(0, (len(videos), -1)).sum(1)
            for other in (warp(others, motion), others)
        )
        accepted &= (moving < ACCEPTANCE * still)[:, 0]
    return accepted


def _mismatch(
    first: Float[Tensor, "b 3 h w"], second: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, "b 1 h w"]:
    """Variance of the difference around each pixel, to which an even change of light adds none."""
    error = first - second
    squares = blur(error.square().mean(1, keepdim=True), 1.5)
    return squares - blur(error, 1.5).square().mean(1, keepdim=True)
