"""A short training of `tiny` reproduces the recorded figures; a changed constant does not."""

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
def test_training_reproduces_the_record(recipe: str) -> None:
    expected = recorded(recipe)
    assert len(expected) == STEPS and expected[0]["margin"] == 0
    assert deviation(figures(run(recipe)), expected) < TOLERANCE


def longer_schedule(model: VideoModel) -> None:
    """Increase the variance of the training noise by 1% per timestep."""
    betas = model.scheduler.betas  # type: ignore[attr-defined]
    model._alphas = torch.cumprod(1 - 1.01 * betas, 0)  # type: ignore[attr-defined]


def test_a_change_of_one_percent_is_detected() -> None:
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
