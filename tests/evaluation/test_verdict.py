from __future__ import annotations

import numpy as np
import pytest

from dpo_video.evaluation.verdict import MetricResult, Outcome, Role, judge_evaluation
from dpo_video.support.formatting import brief


def metric(
    name: str, role: Role, change: float, *, noise: float = 0.1, n: int = 47
) -> MetricResult:
    """A metric whose values change by a share on average, exactly, with noise a video."""
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
def test_that_it_moves_more_is_said_only_where_the_interval_says_so(
    noise: float, words: str
) -> None:
    warp = metric("warp_error", Role.TARGET, -0.2)
    motion = metric("dynamic_degree", Role.MOTION, 0.1, noise=noise)
    assert motion.improved == (words == "more than")
    verdict = judge_evaluation([warp, motion])
    assert verdict.outcome is Outcome.IMPROVED
    assert verdict.headline == f"Improved: smoother, and it moves {words} before."


@pytest.mark.parametrize(
    ("changes", "outcome", "headline"),
    [
        ((-0.257, -0.183), Outcome.IMPROVED, "Improved: smoother, and it moves as much as before."),
        ((-0.2, 0.0), Outcome.IMPROVED, "Improved: smoother, and it moves as much as before."),
        ((-0.2, -0.2, -0.029), Outcome.IMPROVED, "as much as before."),
        ((-0.2, -0.2, 0.1), Outcome.IMPROVED, "Improved: smoother, and it moves more than before."),
        ((-0.2, -0.2, -0.031), Outcome.MOVES_LESS, "Smoother because it moves less."),
        ((-0.2, -0.2, -0.6), Outcome.MOVES_LESS, "Smoother because it moves less."),
        (
            (-0.2, -0.2, -0.6, -0.2),
            Outcome.MOVES_LESS,
            "Smoother because it moves less, and less faithful: caption match fell.",
        ),
        (
            (-0.2, -0.2, 0.0, -0.2),
            Outcome.LESS_FAITHFUL,
            "Smoother but less faithful: caption match fell.",
        ),
        ((-0.2, -0.2, 0.0, -0.005), Outcome.IMPROVED, "Improved"),  # within its interval
        ((-0.005, 0.005), Outcome.NO_CLEAR_CHANGE, "No clear change."),
        ((0.0, 0.0, 0.3, 0.3), Outcome.NO_CLEAR_CHANGE, "No clear change."),
        ((0.3, 0.2), Outcome.WORSE, "Worse: warp error rose and frame difference rose."),
        ((0.0, 0.0, -0.3), Outcome.WORSE, "Worse: dynamic degree fell."),
        ((0.0, 0.0, 0.0, -0.3), Outcome.WORSE, "Worse: caption match fell."),
        (
            (-0.2, 0.2),
            Outcome.MIXED,
            "Mixed: warp error got better, frame difference got worse.",
        ),
    ],
)
def test_every_outcome(changes: tuple[float, ...], outcome: Outcome, headline: str) -> None:
    found = judge(*changes)
    assert found[0] is outcome
    assert headline in found[1]


def test_nothing_is_improved_while_nobody_watches_the_motion() -> None:
    verdict = judge_evaluation([metric("warp_error", Role.TARGET, -0.3)])
    assert verdict.outcome is Outcome.UNPROVEN
    assert any("--metric dynamic_degree" in sentence for sentence in verdict.details)
    assert any("No metric guarded" in sentence for sentence in verdict.details)


def test_the_tolerance_is_the_users() -> None:
    metrics = [
        metric("warp_error", Role.TARGET, -0.3),
        metric("dynamic_degree", Role.MOTION, -0.08),
    ]
    assert judge_evaluation(metrics).outcome is Outcome.MOVES_LESS
    assert judge_evaluation(metrics, tolerance=0.1).outcome is Outcome.IMPROVED


def test_doubt_about_the_motion_is_said() -> None:
    metrics = [
        metric("warp_error", Role.TARGET, -0.3),
        metric("dynamic_degree", Role.MOTION, -0.01, noise=0.4),
    ]
    verdict = judge_evaluation(metrics)
    assert verdict.outcome is Outcome.IMPROVED
    assert "cannot rule out a larger fall" in verdict.details[1]


def test_other_targets_are_better_rather_than_smoother() -> None:
    metrics = [
        metric("aesthetic_score", Role.TARGET, -0.3),
        metric("dynamic_degree", Role.MOTION, 0.0),
    ]
    assert "Improved: better, and" in judge_evaluation(metrics).headline


def test_few_videos_are_said_to_be_few() -> None:
    verdict = judge_evaluation([metric("warp_error", Role.TARGET, -0.3, n=6)])
    assert "With 6 videos the intervals are rough." in verdict.details


def test_the_details_have_the_numbers() -> None:
    one = metric("warp_error", Role.TARGET, -0.25)
    (sentence, *_) = judge_evaluation([one]).details
    assert sentence.startswith(f"Warp error fell from {brief(one.difference.base_mean)} to ")
    assert "95% interval" in sentence and "25.0%" in sentence and sentence.endswith(": better.")


def test_without_a_target_there_is_nothing_to_judge() -> None:
    with pytest.raises(ValueError, match="target"):
        judge_evaluation([metric("dynamic_degree", Role.MOTION, 0.0)])
