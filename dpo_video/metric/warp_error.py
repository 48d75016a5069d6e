"""Warping error: how badly a frame warped along the optical flow predicts the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F

from dpo_video.errors import UserError
from dpo_video.metric._flow import Flow, Frames, visible, warp, without_doubtful_motion
from dpo_video.metric._flow_methods import flow_between, luma, opencv_flow, second_flow
from dpo_video.paths import LocalPath
from dpo_video.strategies import Metric
from dpo_video.types import PerPair, Videos


@final
class WarpError(Metric):
    """Warping error: mean squared error of frame t, warped, against frame t+1, on the 0-255 scale.

    Frame t is sampled along the flow from frame t+1 to t. Pixels of frame t+1 that frame t does not
    show are masked by forward-backward consistency (Lai et al. 2018, arXiv 1808.00449, Eq. 9-10).
    If every pixel of a pair of frames is masked, all of them count. Bilinear sampling blurs, so
    fine texture leaves an error even under a perfect flow.
    """

    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "squared 0-255"

    flow: Literal[
        "lucas_kanade", "dis", "farneback", "raft", "videodpo_lk", "videodpo_farneback"
    ] = "lucas_kanade"
    """Optical flow. `dis`, `farneback` (OpenCV) and `raft` (torchvision) are second opinions.
    `videodpo_lk` and `videodpo_farneback` reproduce Video-DPO, for comparison with its figures
    only: both sample frame t at x + flow(t, t+1), the wrong direction, which doubles a motion
    instead of undoing it and rewards a frozen video. `videodpo_farneback` gave its headline (150.32
    to 111.62); `videodpo_lk` uses each pixel's gradient alone, here on the 0-255 scale."""
    raft_weights: LocalPath = ""
    """Path of torchvision's RAFT weights, for `raft`."""

    def witness(self) -> tuple[str, Metric]:
        """The same metric by a second optical flow."""
        name, flow = second_flow(self.flow)
        return name, self.model_copy(update={"flow": flow})

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One value per video; UserError for videos of a single frame."""
        pairs = videos.shape[2] - 1
        if pairs < 1:
            raise UserError(
                "warp_error compares consecutive frames, and these videos have only one. "
                "Use videos of 2 frames or more."
            )
        frames = videos.float().transpose(1, 2)
        before, after = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)
        if self.flow == "videodpo_lk" or self.flow == "videodpo_farneback":
            published = _per_pixel_flow if self.flow == "videodpo_lk" else _farneback_flow
            back = published(before, after)
            mask = torch.ones_like(back[:, :1])
        else:
            back, forth = (
                flow_between(self.flow, *pair, raft_weights=self.raft_weights)
                for pair in ((after, before), (before, after))
            )
            if self.flow == "lucas_kanade":
                back = without_doubtful_motion(after, before, back)
                forth = without_doubtful_motion(before, after, forth)
            mask = visible(back, forth).float()
            mask = torch.where(mask.any(dim=-1).any(dim=-1)[..., None, None], mask, 1.0)
        squared = (warp(before, back) - after).square().mean(1, keepdim=True)
        errors = (squared * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
        return 255**2 * errors.unflatten(0, (-1, pairs)).mean(1)


def _per_pixel_flow(before: Frames, after: Frames) -> Flow:
    """Video-DPO's fallback flow: the brightness constraint of each pixel, regularised by 1e-6."""
    first, second = luma(before), luma(after)
    smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    sobel = torch.stack([smooth.outer(slope), slope.outer(smooth)])[:, None] / 8
    gradient = F.conv2d(first, sobel.to(first), padding=1)
    step = (first - second) / (gradient.square().sum(1, keepdim=True) + 1e-6)
    return (step * gradient).clamp(-50, 50)


def _farneback_flow(before: Frames, after: Frames) -> Flow:
    """OpenCV's Farneback flow with Video-DPO's settings."""
    return opencv_flow("farneback", before, after, farneback=(0.5, 3, 15, 3, 5, 1.2, 0))
