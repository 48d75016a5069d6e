"""Losses on the errors of a pair.

The classes are attributes of this package, imported when they are first used.
"""

from typing import TYPE_CHECKING

from dpo_video.registry.lazy import lazy

if TYPE_CHECKING:
    from dpo_video.loss.dpop import DPOP as DPOP
    from dpo_video.loss.global_ import Global as Global
    from dpo_video.loss.group import Group as Group
    from dpo_video.loss.hinge import Hinge as Hinge
    from dpo_video.loss.ipo import IPO as IPO
    from dpo_video.loss.kto import KTO as KTO
    from dpo_video.loss.mapo import MaPO as MaPO
    from dpo_video.loss.poly import Poly as Poly
    from dpo_video.loss.region import Region as Region
    from dpo_video.loss.robust import Robust as Robust
    from dpo_video.loss.sdpo import SDPO as SDPO
    from dpo_video.loss.segment import Segment as Segment
    from dpo_video.loss.sft import SFT as SFT

__getattr__, __dir__ = lazy("loss")
