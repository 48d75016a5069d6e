"""Backbones: families of video diffusion models.

The classes are attributes of this package, imported when they are first used.
"""

from typing import TYPE_CHECKING

from dpo_video.registry.lazy import lazy

if TYPE_CHECKING:
    from dpo_video.backbone.animatediff import AnimateDiff as AnimateDiff
    from dpo_video.backbone.cogvideox import CogVideoX as CogVideoX
    from dpo_video.backbone.tiny import Tiny as Tiny
    from dpo_video.backbone.wan import Wan as Wan

__getattr__, __dir__ = lazy("backbone")
