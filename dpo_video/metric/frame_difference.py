"""Frame difference: change of the pixels between consecutive frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from dpo_video.errors import UserError
from dpo_video.strategies import Metric
from dpo_video.types import PerPair, Videos


@final
class FrameDifference(Metric):
    """Frame difference: mean absolute difference of consecutive frames, on the 0-255 scale.

    As published with Video-DPO. Flicker and motion both raise it, and a frozen video scores 0: read
    it together with `dynamic_degree`.
    """

    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "0-255"

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One value per video; UserError for videos of a single frame."""
        if videos.shape[2] < 2:
            raise UserError(
                "frame_difference compares consecutive frames, and these videos have only one. "
                "Use videos of 2 frames or more."
            )
        return 255 * videos.float().diff(dim=2).abs().mean(dim=(1, 2, 3, 4))
