"""Share of the frames that are new: a guard against held and dropped frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch

from dpo_video.strategies import Metric
from dpo_video.types import PerPair, Videos

REPEATED = 0.05  # of the mean difference between consecutive frames


@final
class NewFrames(Metric):
    """Share of the frames, but for the first, that are no repetition of the previous one.

    A guard against improving other metrics by stutter: a video that holds every frame for two has
    no error in half of its pairs of frames. A frame repeats the previous one if their mean absolute
    difference is below 5% of the video's mean. Videos with a picture of their own in every frame
    have 1, however unevenly they move (above 20% on real clips and samples of `tiny`). So has a
    frozen video, which `dynamic_degree` tells.
    """

    higher_is_better: ClassVar[bool] = True
    role: ClassVar[Literal["target", "motion", "guard"]] = "guard"
    unit: ClassVar[str] = "share"

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One value per video; 1 for videos of a single frame."""
        if videos.shape[2] < 2:
            return torch.ones(len(videos), device=videos.device)
        difference = videos.float().diff(dim=2).abs().mean(dim=(1, 3, 4))
        new = difference >= REPEATED * difference.mean(1, keepdim=True)
        return new.float().mean(1)
