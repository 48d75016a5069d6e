"""Checks of pair sets, which an audit runs.

The classes are attributes of this package, imported when they are first used.
"""

from typing import TYPE_CHECKING

from dpo_video.registry.lazy import lazy

if TYPE_CHECKING:
    from dpo_video.checks.labels import Labels as Labels
    from dpo_video.checks.labels import Motion as Motion
    from dpo_video.checks.labels import Shortcut as Shortcut
    from dpo_video.checks.latents import Difference as Difference
    from dpo_video.checks.latents import Duplicates as Duplicates
    from dpo_video.checks.latents import Model as Model
    from dpo_video.checks.latents import Numbers as Numbers
    from dpo_video.checks.latents import Region as Region
    from dpo_video.checks.latents import Scale as Scale
    from dpo_video.checks.prompts import Leakage as Leakage
    from dpo_video.checks.prompts import Length as Length
    from dpo_video.checks.prompts import Prompts as Prompts

__getattr__, __dir__ = lazy("check", "checks")
