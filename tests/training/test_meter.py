"""The check of the first step."""

from __future__ import annotations

import pytest
import torch

from dpo_video.errors import TrainingError
from dpo_video.training.meter import check_first_step
from dpo_video.training.objective import PairFigures


def figures(margin: float, change: float) -> PairFigures:
    zero = torch.zeros(2)
    return PairFigures(
        loss=zero, margin=zero + margin, logits=zero, gradient_factor=zero,
        chosen_change=zero + change, rejected_change=zero,
    )  # fmt: skip


def test_a_margin_at_the_first_step_is_blamed_on_what_makes_it() -> None:
    check_first_step(figures(0.0, 0.0))
    with pytest.raises(TrainingError, match="the loss gives a margin of 1 instead of 0"):
        check_first_step(figures(1.0, 0.0))
    with pytest.raises(TrainingError, match="The two do not run alike"):
        check_first_step(figures(1.0, 0.5))
