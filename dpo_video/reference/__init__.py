"""References: sources of the frozen model's predictions.

The classes are attributes of this package, imported when they are first used.
"""

from typing import TYPE_CHECKING

from dpo_video.registry.lazy import lazy

if TYPE_CHECKING:
    from dpo_video.reference.cached import Cached as Cached
    from dpo_video.reference.copy import Copy as Copy
    from dpo_video.reference.ema import EMA as EMA
    from dpo_video.reference.none import NoReference as NoReference
    from dpo_video.reference.toggle import Toggle as Toggle

__getattr__, __dir__ = lazy("reference")
