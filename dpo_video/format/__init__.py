"""Formats of exports.

The classes are attributes of this package, imported when they are first used.
"""

from typing import TYPE_CHECKING

from dpo_video.registry.lazy import lazy

if TYPE_CHECKING:
    from dpo_video.format.comfyui import ComfyUI as ComfyUI
    from dpo_video.format.diffusers import Diffusers as Diffusers
    from dpo_video.format.merged import Merged as Merged
    from dpo_video.format.peft import PEFT as PEFT

__getattr__, __dir__ = lazy("format")
