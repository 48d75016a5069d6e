"""Optimizers of the adapter.

The classes are attributes of this package, imported when they are first used.
"""

from typing import TYPE_CHECKING

from dpo_video.registry.lazy import lazy

if TYPE_CHECKING:
    from dpo_video.optimizer.adamw import AdamW as AdamW

__getattr__, __dir__ = lazy("optimizer")
