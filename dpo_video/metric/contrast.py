"""Contrast: spread of the pixel values, a guard against pale and dark videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch

from dpo_video.strategies import Metric
from dpo_video.types import PerPair, Videos

TOGETHER = 4  # frames


@final
class Contrast(Metric):
    """Contrast: standard deviation of the pixel values of a frame, per channel, in [0, 0.5].

    A guard against improving other metrics by pale or dark videos: with 80% of the contrast, a
    warping error is 64% and a frame difference 80% of what it was. Means of 4 consecutive frames
    are measured, so that the spread that flicker and grain add counts little.

    Limits: more motion blurs the means, which lowers the value a little; a picture that fades
    evenly towards one colour counts, another choice of colours counts too.
    """

    higher_is_better: ClassVar[bool] = True
    role: ClassVar[Literal["target", "motion", "guard"]] = "guard"
    unit: ClassVar[str] = "share of white"

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One value per video; frames that do not fill a group of 4 are its last group."""
        groups = videos.float().split(TOGETHER, dim=2)
        spread = [group.mean(2).flatten(2).std(dim=2, correction=0).mean(1) for group in groups]
        return torch.stack(spread).mean(0)
