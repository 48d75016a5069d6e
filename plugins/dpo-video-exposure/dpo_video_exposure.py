"""The labeler `exposure`: an example of a plugin for dpo-video that labels pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from dpo_video.plugin import Field, LabelResult, ReasonedLabeler, Videos


@final
class Exposure(ReasonedLabeler):
    """Exposure: prefers the video with fewer clipped pixels, that is pure white or black ones.

    A pixel is clipped if all of its channels are within `margin` of 0 or of 1. Detail that is
    clipped is lost. Photographers look for it with zebra patterns and the ends of the histogram.
    """

    margin: float = Field(default=2 / 255, ge=0, lt=0.5)
    """Distance from pure black or white, of 1, up to which a pixel is clipped."""
    tie: float = Field(default=0.01, ge=0, le=1)
    """Difference of the two shares of clipped pixels up to which two videos are equally good."""

    def judge(
        self, prompts: Sequence[str], first: Videos, second: Videos, segments: Sequence[slice]
    ) -> LabelResult:
        """A label per pair and segment, and the two shares as the reason."""
        clipped = [self._clipped(videos) for videos in (first, second)]
        shares = [
            torch.stack([each[:, part].mean(dim=1) for part in segments], dim=1) for each in clipped
        ]
        lead = shares[1] - shares[0]
        notes = [
            f"clipped: {one:.1%} of the first, {other:.1%} of the second"
            for one, other in zip(*(each.mean(dim=1).tolist() for each in clipped), strict=True)
        ]
        labels = torch.where(lead.abs() > self.tie, lead.sign(), 0.0)
        return LabelResult(labels=labels, notes=notes, figures={"videos": 2.0 * len(first)})

    def _clipped(self, videos: Videos) -> Tensor:
        """Share of clipped pixels of every frame, `(b, F)`."""
        low = videos.amax(dim=1) <= self.margin
        high = videos.amin(dim=1) >= 1 - self.margin
        return (low | high).float().mean(dim=(2, 3))
