"""Features of videos of the procedural world, for a Frechet distance."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_video.tiny.judge import Judge, judge_videos, load_judge
from dpo_video.types import Videos


def video_features(videos: Videos, judge: Judge | None = None) -> Float[Tensor, "b 48"]:
    """The "judge features" of videos of at least two frames.

    The first half is the mean over time of the frames' features and measures appearance; the second
    is the mean absolute difference between consecutive frames' features and measures shapes that
    flicker, change or break up. Both are in standard deviations of real clips. 48 features are few
    enough for a covariance from 47 videos.
    """
    judge = judge or load_judge(videos.device)
    return (_unscaled(videos, judge) - judge.video_mean) / judge.video_scale


@torch.no_grad()
def set_scale(judge: Judge, videos: Videos) -> None:
    """Set the mean and the scale of `video_features` from real clips."""
    features = _unscaled(videos, judge)
    judge.video_mean.copy_(features.mean(dim=0))
    judge.video_scale.copy_(features.std(dim=0).clamp(min=1e-3))


def _unscaled(videos: Videos, judge: Judge) -> Float[Tensor, "b 48"]:
    features = judge_videos(videos, judge).features
    return torch.cat([features.mean(dim=1), features.diff(dim=1).abs().mean(dim=1)], dim=1)
