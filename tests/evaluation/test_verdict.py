from __future__ import annotations

import numpy as np
import pytest

from dpo_video.evaluation.verdict import MetricResult, Outcome, Role, judge_evaluation
from dpo_video.support.formatting import brief


def metric(
    name: str, role: Role, change: float, *, noise: float = 0.1, n: int = 47
) -> MetricResult:
    """A metric whose mean changes by exactly `change`, with noise per video."""
    rng = np.random.default_rng(len(name))
    base = rng.lognormal(1, 0.3, n)
    wobble = noise * rng.normal(size=n)
    wobble -= (wobble * base).sum() / base.sum()
    return MetricResult.measured(
        name,
        list(base),
        list(base * (1 + change + wobble)),
        unit="",
        higher_is_better=role is not Role.TARGET,
        role=role,
    )


def judge(
    warp: float = 0.0, difference: float = 0.0, motion: float = 0.0, match: float = 0.0
) -> tuple[Outcome, str]:
    verdict = judge_evaluation(
        [
            metric("warp_error", Role.TARGET, warp),
            metric("frame_difference", Role.TARGET, difference),
            metric("dynamic_degree", Role.MOTION, motion),
            metric("caption_match", Role.GUARD, match),
        ]
    )
    assert len(verdict.details) == 4
    return verdict.outcome, verdict.headline


@pytest.mark.parametrize(("noise", "words"), [(0.1, "more than"), (1.0, "no less than")])
def test_more_motion_needs_an_interval_above_zero(noise: float, words: str) -> None:
    warp = metric("warp_error", Role.TARGET, -0.2)
    motion = metric("dynamic_degree", Role.MOTION, 0.1, noise=noise)
    assert motion.improved == (words == "more than")
    verdict = judge_evaluation([warp, motion])
    assert verdict.outcome is Outcome.IMPROVED
    assert verdict.headline == f"Improved: the videos are smoother and move {words} before."


@pytest.mark.parametrize(
    ("changes", "outcome", "headline"),
    [
        ((-0.257, -0.183), Outcome.IMPROVED, "the videos are smoother and move as much as before."),
        ((-0.2, 0.0), Outcome.IMPROVED, "the videos are smoother and move as much as before."),
        ((-0.2, -0.2, -0.029), Outcome.IMPROVED, "as much as before."),
        ((-0.2, -0.2, 0.1), Outcome.IMPROVED, "the videos are smoother and move more than before."),
        (
            (-0.2, -0.2, -0.031),
            Outcome.MOVES_LESS,
            "smoother, but move less.",
        ),
        (
            (-0.2, -0.2, -0.6),
            Outcome.MOVES_LESS,
            "smoother, but move less.",
        ),
        (
            (-0.2, -0.2, -0.6, -0.2),
            Outcome.MOVES_LESS,
            "smoother, but move less and are less faithful (caption match fell).",
        ),
        (
            (-0.2, -0.2, 0.0, -0.2),
            Outcome.LESS_FAITHFUL,
            "Not improved: the videos are smoother, but less faithful (caption match fell).",
        ),
        ((-0.2, -0.2, 0.0, -0.005), Outcome.IMPROVED, "Improved"),  # within its interval
        ((-0.005, 0.005), Outcome.NO_CLEAR_CHANGE, "No target metric changed clearly."),
        ((0.0, 0.0, 0.3, 0.3), Outcome.NO_CLEAR_CHANGE, "No target metric changed clearly."),
        ((0.3, 0.2), Outcome.WORSE, "Worse: warp error and frame difference rose."),
        ((0.0, 0.0, -0.3), Outcome.WORSE, "Worse: dynamic degree fell."),
        ((0.0, 0.0, 0.0, -0.3), Outcome.WORSE, "Worse: caption match fell."),
        (
            (-0.2, 0.2),
            Outcome.MIXED,
            "Mixed: warp error improved, but frame difference got worse.",
        ),
    ],
)
def test_every_outcome(changes: tuple[float, ...], outcome: Outcome, headline: str) -> None:
    found = judge(*changes)
    assert found[0] is outcome
    assert headline in found[1]


def test_improved_needs_a_motion_metric() -> None:
    verdict = judge_evaluation([metric("warp_error", Role.TARGET, -0.3)])
    assert verdict.outcome is Outcome.UNPROVEN
    assert any("--metric dynamic_degree" in sentence for sentence in verdict.details)
    assert any("No guard metric" in sentence for sentence in verdict.details)


def test_the_tolerance_is_an_option() -> None:
    metrics = [
        metric("warp_error", Role.TARGET, -0.3),
        metric("dynamic_degree", Role.MOTION, -0.08),
    ]
    assert judge_evaluation(metrics).outcome is Outcome.MOVES_LESS
    assert judge_evaluation(metrics, tolerance=0.1).outcome is Outcome.IMPROVED


def test_an_uncertain_motion_is_stated() -> None:
    metrics = [
        metric("warp_error", Role.TARGET, -0.3),
        metric("dynamic_degree", Role.MOTION, -0.01, noise=0.4),
    ]
    verdict = judge_evaluation(metrics)
    assert verdict.outcome is Outcome.IMPROVED
    assert "cannot rule out a larger fall" in verdict.details[1]


def test_other_targets_are_called_better() -> None:
    metrics = [
        metric("aesthetic_score", Role.TARGET, -0.3),
        metric("dynamic_degree", Role.MOTION, 0.0),
    ]
    assert "the videos are better and" in judge_evaluation(metrics).headline


def test_few_videos_are_stated() -> None:
    verdict = judge_evaluation([metric("warp_error", Role.TARGET, -0.3, n=6)])
    assert any("With 6 videos the intervals are rough" in text for text in verdict.details)


def test_the_details_give_the_numbers() -> None:
    one = metric("warp_error", Role.TARGET, -0.25)
    (sentence, *_) = judge_evaluation([one]).details
    assert sentence.startswith(f"Warp error fell from {brief(one.difference.base_mean)} to ")
    assert "95% interval" in sentence and "25.0%" in sentence and sentence.endswith(": better.")


def test_a_verdict_needs_a_target() -> None:
    with pytest.raises(ValueError, match="target"):
        judge_evaluation([metric("dynamic_degree", Role.MOTION, 0.0)])
