"""Samplers of training timesteps.

The classes are attributes of this package, imported when they are first used.
"""

from typing import TYPE_CHECKING

from dpo_video.registry.lazy import lazy

if TYPE_CHECKING:
    from dpo_video.timesteps.family import Family as Family

__getattr__, __dir__ = lazy("timesteps")
