"""DenseDPO."""

from __future__ import annotations

from typing import Literal, final

import torch
import torch.nn.functional as F
from pydantic import Field

from dpo_video.loss.functional import with_sft
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors, PerPair, Preference


@final
class Segment(Loss):
    """DenseDPO: compares the two videos frame by frame, each frame by its own label.

    Errors are averaged over channels and space, and `-logsigmoid(beta * l * (d(second) -
    d(first)))` over all frames of a step's pairs whose label `l` is not 0 (Wu et al. 2025, arXiv
    2506.03517). A pair whose frames are all ties has no gradient; a pair judged as a whole has the
    same label in every frame.
    """

    beta: float = Field(default=250.0, gt=0)
    """Slope on a frame's margin of mean squared errors. The paper multiplies by a hidden 0.5: its
    500 is 250 here."""
    per: Literal["frame", "clip"] = "frame"
    """One sigmoid per "frame" (the paper's appendix E, which its experiments use), so that a pair
    counts by the number of its frames with a preference. Or one per "clip" over the sum of the
    frames' margins (its Eq. 7) divided by the number of all frames, so that `beta` does not depend
    on a video's length; all pairs then count equally. With equal labels everywhere, "clip" is the
    loss `global` of the same beta."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the video that each frame's label prefers, added to the
    loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        labels = errors.preference
        first, second = (
            change.mean(dim=(1, 3, 4)) for change in (errors.change_first, errors.change_second)
        )
        weights = self._frame_weights(labels)

        def summed(frames: Preference) -> PerPair:
            return (weights * frames).sum(dim=1)

        margins = labels * (second - first)
        margin = summed(margins)
        logits = self.beta * (margins if self.per == "frame" else margin)
        loss = -F.logsigmoid(logits)
        output = LossOutput(
            loss=summed(loss) if self.per == "frame" else loss,
            margin=margin,
            chosen_change=summed(torch.where(labels >= 0, first, second)),
            rejected_change=summed(torch.where(labels >= 0, second, first)),
        )
        return with_sft(output, errors, self.sft_weight, labels)

    def pair_weights(self, preference: Preference) -> PerPair:
        """With `per = "frame"`, a pair counts by the number of its frames with a preference."""
        if self.per == "clip":
            return super().pair_weights(preference)
        return (preference != 0).sum(dim=1).float()

    def _frame_weights(self, labels: Preference) -> Preference:
        """Weight of each frame: equal for those with a preference, 0 for ties."""
        decided = labels != 0
        if self.per == "clip":
            return decided / labels.shape[1]
        # A pair of ties alone keeps the ln 2 of its frames, which has no gradient.
        counted = decided | ~decided.any(dim=1, keepdim=True)
        return counted / counted.sum(dim=1, keepdim=True)
