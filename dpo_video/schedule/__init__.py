"""Schedules of the learning rate.

The classes are attributes of this package, imported when they are first used.
"""

from typing import TYPE_CHECKING

from dpo_video.registry.lazy import lazy

if TYPE_CHECKING:
    from dpo_video.schedule.linear import Linear as Linear

__getattr__, __dir__ = lazy("schedule")
