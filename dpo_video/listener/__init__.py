"""Listeners of a training.

The classes are attributes of this package, imported when they are first used.
"""

from typing import TYPE_CHECKING

from dpo_video.registry.lazy import lazy

if TYPE_CHECKING:
    from dpo_video.listener.early_stop import EarlyStop as EarlyStop

__getattr__, __dir__ = lazy("listener")
