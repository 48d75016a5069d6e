"""A short training of `tiny` gives the figures on record, and would not if a constant were off."""

from __future__ import annotations

import pytest
import torch

from benchmarks.trust.trajectory import (
    FIGURES,
    RECIPES,
    STEPS,
    TOLERANCE,
    deviation,
    figures,
    recorded,
    run,
)
from dpo_video.strategies import VideoModel


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_the_one_on_record(recipe: str) -> None:
    expected = recorded(recipe)
    assert len(expected) == STEPS and expected[0]["margin"] == 0
    assert deviation(figures(run(recipe)), expected) < TOLERANCE


def longer_schedule(model: VideoModel) -> None:
    """Training noise whose variance grows by 1% more a step."""
    betas = model.scheduler.betas  # type: ignore[attr-defined]
    model._alphas = torch.cumprod(1 - 1.01 * betas, 0)  # type: ignore[attr-defined]


def test_a_drift_of_one_percent_would_be_seen() -> None:
    recipe = "jitter, sdpo"
    expected = recorded(recipe)
    steeper = figures(run(recipe, steps=1, options=["loss.beta=2525"]))
    assert deviation(steeper, expected) > 3 * TOLERANCE
    noisier = figures(run(recipe, steps=1, change=longer_schedule))
    assert deviation(noisier, expected) > 3 * TOLERANCE


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_counts(figure: str) -> None:
    expected = recorded("local, region")
    found = [dict(step) for step in expected]
    assert deviation(found, expected) == 0
    found[-1][figure] *= 1 + 2 * TOLERANCE
    found[-1][figure] += 1e-9
    assert deviation(found, expected) > 0
    if figure in ("loss", "grad_norm", "rejected_change"):  # the largest of their kind
        assert deviation(found, expected) > TOLERANCE
