"""Contracts of strategies, built-in or your own.

    from dpo_video.testing import check_loss

    def test_contract() -> None:
        check_loss(Focal())

Each check raises an AssertionError that states what is wrong and what to do. They need no test
framework, no download and no GPU.
"""

from __future__ import annotations

from dpo_video.testing.checks import check_check
from dpo_video.testing.commands import check_command
from dpo_video.testing.contracts import (
    check_labeler,
    check_loss,
    check_metric,
    check_options,
    check_pairs,
)
from dpo_video.testing.formats import check_format
from dpo_video.testing.inputs import (
    PREFERENCES,
    SMALL_CHANGE,
    SteadyLabeler,
    random_errors,
    small_videos,
    swapped,
)
from dpo_video.testing.listeners import check_listener
from dpo_video.testing.models import check_backbone, check_backbone_model, check_reference
from dpo_video.testing.steps import check_optimizer, check_schedule, check_timesteps
from dpo_video.testing.strided import StridedModel

__all__ = [
    "PREFERENCES",
    "SMALL_CHANGE",
    "SteadyLabeler",
    "StridedModel",
    "check_backbone",
    "check_backbone_model",
    "check_check",
    "check_command",
    "check_format",
    "check_labeler",
    "check_listener",
    "check_loss",
    "check_metric",
    "check_optimizer",
    "check_options",
    "check_pairs",
    "check_reference",
    "check_schedule",
    "check_timesteps",
    "random_errors",
    "small_videos",
    "swapped",
]
