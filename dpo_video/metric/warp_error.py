"""Warping error: how badly a frame warped along the optical flow predicts the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_video.errors import UserError
from dpo_video.metric._flow import Flow, Frames, dense_flow, visible, warp
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

    variant: Literal["lucas_kanade", "videodpo_lk", "videodpo_farneback"] = "lucas_kanade"
    """`videodpo_lk` and `videodpo_farneback` reproduce Video-DPO, for comparison with its figures
    only: both sample frame t at x + flow(t, t+1), the wrong direction, which doubles a motion
    instead of undoing it and rewards a frozen video. `videodpo_farneback` gave its headline (150.32
    to 111.62); `videodpo_lk` uses each pixel's gradient alone, here on the 0-255 scale."""

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
        if self.variant == "lucas_kanade":
            back = dense_flow(after, before)
            mask = visible(back, dense_flow(before, after)).float()
            mask = torch.where(mask.any(dim=-1).any(dim=-1)[..., None, None], mask, 1.0)
        else:
            published = _per_pixel_flow if self.variant == "videodpo_lk" else _farneback_flow
            back = published(before, after)
            mask = torch.ones_like(back[:, :1])
        squared = (warp(before, back) - after).square().mean(1, keepdim=True)
        errors = (squared * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
        return 255**2 * errors.unflatten(0, (-1, pairs)).mean(1)


def _per_pixel_flow(before: Frames, after: Frames) -> Flow:
    """Video-DPO's fallback flow: the brightness constraint of each pixel, regularised by 1e-6."""
    first, second = _luma(before), _luma(after)
    smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    sobel = torch.stack([smooth.outer(slope), slope.outer(smooth)])[:, None] / 8
    gradient = F.conv2d(first, sobel.to(first), padding=1)
    step = (first - second) / (gradient.square().sum(1, keepdim=True) + 1e-6)
    return (step * gradient).clamp(-50, 50)


def _farneback_flow(before: Frames, after: Frames) -> Flow:
    """OpenCV's Farneback flow of 8-bit gray frames, with Video-DPO's settings."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "The warp_error variant 'videodpo_farneback' needs OpenCV. Install it (pip install "
            "opencv-python-headless), or set metric.warp_error.variant=lucas_kanade."
        ) from error
    flows = [
        torch.from_numpy(
            cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        )
        for first, second in zip(_bytes(before), _bytes(after), strict=True)
    ]
    return torch.stack(flows).movedim(-1, 1).to(before)


def _bytes(frames: Frames) -> Sequence[object]:
    return list((255 * _luma(frames)).round().clamp(0, 255).byte()[:, 0].cpu().numpy())


def _luma(frames: Frames) -> Float[Tensor, "n 1 H W"]:
    weights = frames.new_tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
    return torch.einsum("nchw,c->nhw", frames, weights)[:, None]
