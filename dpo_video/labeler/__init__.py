"""Labelers: what judges which of two videos is better.

The classes are attributes of this package, imported when they are first used.
"""

from typing import TYPE_CHECKING

from dpo_video.registry.lazy import lazy

if TYPE_CHECKING:
    from dpo_video.labeler.metric import ByMetric as ByMetric
    from dpo_video.labeler.page import Page as Page
    from dpo_video.labeler.recorded import Recorded as Recorded
    from dpo_video.labeler.vlm import VLM as VLM

__getattr__, __dir__ = lazy("labeler")
