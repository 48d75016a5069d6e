"""Metrics: one number per video.

The classes are attributes of this package, imported when they are first used.
"""

from typing import TYPE_CHECKING

from dpo_video.registry.lazy import lazy

if TYPE_CHECKING:
    from dpo_video.metric.caption_match import CaptionMatch as CaptionMatch
    from dpo_video.metric.contrast import Contrast as Contrast
    from dpo_video.metric.dynamic_degree import DynamicDegree as DynamicDegree
    from dpo_video.metric.frame_difference import FrameDifference as FrameDifference
    from dpo_video.metric.new_frames import NewFrames as NewFrames
    from dpo_video.metric.sharpness import Sharpness as Sharpness
    from dpo_video.metric.warp_error import WarpError as WarpError

__getattr__, __dir__ = lazy("metric")
