"""How badly a frame, moved along the optical flow, predicts the next one."""

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
    """Mean squared error between frame t, warped, and frame t+1, on the 0-255 scale.

    Frame t is sampled where the flow from frame t+1 says that its pixels come from, and pixels that
    frame t does not show are left out, by forward-backward consistency (as in Lai et al. 2018,
    arXiv 1808.00449, Eq. 9-10). A pair of frames of which nothing is found again counts in full.
    Bilinear sampling blurs, so that fine texture leaves an error even under a perfect flow.
    """

    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "squared 0-255"

    variant: Literal["lucas_kanade", "videodpo_lk", "videodpo_farneback"] = "lucas_kanade"
    """`lk` and `farneback` are what Video-DPO published, for comparison with its figures only: both
    sample frame t at x + flow(t, t+1), the wrong way round, which about doubles a motion instead of
    undoing it and rewards a frozen video. `farneback` is the one behind its headline (150.32 to
    111.62); `lk` takes each pixel's gradient alone, and is shown here on the 0-255 scale."""

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One number a video; a UserError for videos of a single frame."""
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
            shown = visible(back, dense_flow(before, after)).float()
            shown = torch.where(shown.any(dim=-1).any(dim=-1)[..., None, None], shown, 1.0)
        else:
            published = _per_pixel_flow if self.variant == "videodpo_lk" else _farneback_flow
            back = published(before, after)
            shown = torch.ones_like(back[:, :1])
        squared = (warp(before, back) - after).square().mean(1, keepdim=True)
        errors = (squared * shown).sum(dim=(1, 2, 3)) / shown.sum(dim=(1, 2, 3))
        return 255**2 * errors.unflatten(0, (-1, pairs)).mean(1)


def _per_pixel_flow(before: Frames, after: Frames) -> Flow:
    """Video-DPO's fallback flow: each pixel's own brightness constraint, regularised by 1e-6."""
    first, second = _luma(before), _luma(after)
    smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    sobel = torch.stack([smooth.outer(slope), slope.outer(smooth)])[:, None] / 8
    gradient = F.conv2d(first, sobel.to(first), padding=1)
    step = (first - second) / (gradient.square().sum(1, keepdim=True) + 1e-6)
    return (step * gradient).clamp(-50, 50)


def _farneback_flow(before: Frames, after: Frames) -> Flow:
    """OpenCV's Farneback flow on 8-bit frames, with Video-DPO's settings."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "warp_error's variant 'farneback' needs OpenCV. "
            "Install it (pip install opencv-python-headless), or use variant 'corrected'."
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
