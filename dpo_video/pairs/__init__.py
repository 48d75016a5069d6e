"""Pair builders: how preference pairs are made.

The classes are attributes of this package, imported when they are first used.
"""

from typing import TYPE_CHECKING

from dpo_video.registry.lazy import lazy

if TYPE_CHECKING:
    from dpo_video.pairs.dense import Dense as Dense
    from dpo_video.pairs.folder import Folder as Folder
    from dpo_video.pairs.img2img import Img2Img as Img2Img
    from dpo_video.pairs.jitter import Jitter as Jitter
    from dpo_video.pairs.local import Local as Local
    from dpo_video.pairs.ranked import Ranked as Ranked

__getattr__, __dir__ = lazy("pairs")
