from __future__ import annotations

import numpy as np
import pytest

from dpo_video.evaluation.change import Witness
from dpo_video.evaluation.verdict import MetricResult, Outcome, Role, judge_evaluation, rules
from dpo_video.support.formatting import brief, percent


def metric(
    name: str, role: Role, change: float, *, noise: float = 0.05, n: int = 47, **rules: float
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
        **rules,
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
    assert len(verdict.details) == 5  # of every metric, and of the training seeds
    return verdict.outcome, verdict.headline


def test_more_motion_needs_an_interval_above_zero() -> None:
    warp = metric("warp_error", Role.TARGET, -0.2)
    for noise, words in ((0.1, "more than"), (0.35, "as much as")):
        motion = metric("dynamic_degree", Role.MOTION, 0.1, noise=noise)
        verdict = judge_evaluation([warp, motion])
        assert verdict.outcome is Outcome.IMPROVED and motion.mark[1] == "kept"
        assert verdict.headline == f"Improved: the videos are smoother and move {words} before."


@pytest.mark.parametrize(
    ("changes", "outcome", "headline"),
    [
        ((-0.257, -0.183), Outcome.IMPROVED, "the videos are smoother and move as much as before."),
        ((-0.2, 0.0), Outcome.IMPROVED, "the videos are smoother and move as much as before."),
        ((-0.2, -0.2, -0.012), Outcome.IMPROVED, "as much as before."),
        ((-0.2, -0.2, -0.025), Outcome.UNPROVEN, "but dynamic degree is not shown to be kept."),
        ((-0.2, -0.2, 0.1), Outcome.IMPROVED, "the videos are smoother and move more than before."),
        (
            (-0.2, -0.2, -0.05),
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
            "Not improved: the videos are smoother, but are less faithful (caption match fell).",
        ),
        ((-0.2, -0.2, 0.0, -0.005), Outcome.IMPROVED, "Improved"),  # within the tolerance
        (
            (-0.2, -0.2, -0.025, -0.025),
            Outcome.UNPROVEN,
            "dynamic degree and caption match are not",
        ),
        ((-0.015, 0.0), Outcome.NO_CLEAR_CHANGE, "No target metric changed clearly."),  # small
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
    warp = metric("warp_error", Role.TARGET, -0.3)
    motion = metric("dynamic_degree", Role.MOTION, -0.08)
    assert judge_evaluation([warp, motion]).outcome is Outcome.MOVES_LESS
    motion = metric("dynamic_degree", Role.MOTION, -0.08, tolerance=0.1)
    assert judge_evaluation([warp, motion]).outcome is Outcome.IMPROVED


def test_the_least_effect_is_an_option() -> None:
    small = metric("warp_error", Role.TARGET, -0.03, noise=0.01)
    motion = metric("dynamic_degree", Role.MOTION, 0.0)
    assert judge_evaluation([small, motion]).outcome is Outcome.IMPROVED
    small = metric("warp_error", Role.TARGET, -0.03, noise=0.01, min_effect=0.05)
    verdict = judge_evaluation([small, motion])
    assert verdict.outcome is Outcome.NO_CLEAR_CHANGE
    assert "no effect of at least 5%" in verdict.details[0]
    # The interval reaches beyond the least effect, so that a larger one is not excluded.
    wide = metric("warp_error", Role.TARGET, -0.045, noise=0.08, min_effect=0.05)
    assert "smaller than the least effect of 5%" in judge_evaluation([wide]).details[0]


def test_an_uncertain_motion_is_not_shown_to_be_kept() -> None:
    """Non-inferiority: a mean within the tolerance is not enough."""
    metrics = [
        metric("warp_error", Role.TARGET, -0.3),
        metric("dynamic_degree", Role.MOTION, -0.01, noise=0.4),
    ]
    verdict = judge_evaluation(metrics)
    assert verdict.outcome is Outcome.UNPROVEN
    assert "not shown to be kept, because 47 prompts" in verdict.details[1]


def test_equal_values_are_not_worse() -> None:
    """A change that rounds to nothing is no verdict, however narrow its interval."""
    base = [29.7 + i for i in range(12)]
    tiny = MetricResult.measured(
        "warp_error", base, [value - 1e-4 for value in base], unit="", higher_is_better=True,
        role=Role.TARGET,
    )  # fmt: skip
    assert tiny.difference.high < 0
    verdict = judge_evaluation([tiny])
    assert verdict.outcome is Outcome.NO_CLEAR_CHANGE and "stayed at" in verdict.details[0]
    assert "no effect of at least 2%" in verdict.details[0]
    assert "\u22120.0%" not in verdict.details[0]


def test_values_that_differ_read_differently() -> None:
    base = [29.7 + 0.01 * (i % 5) for i in range(20)]
    changed = MetricResult.measured(
        "warp_error", base, [value - 0.01 for value in base], unit="", higher_is_better=True,
        role=Role.TARGET,
    )  # fmt: skip
    (sentence, *_) = judge_evaluation([changed]).details
    assert sentence.startswith("Warp error fell from 29.72 to 29.71 (\u22120.03%, ")


def test_three_training_seeds_of_which_one_failed_are_no_clear_improvement() -> None:
    rng = np.random.default_rng(0)
    base = rng.lognormal(1, 0.3, 47)
    runs = [base * (1 + change + 0.02 * rng.normal(size=47)) for change in (-0.315, -0.314, -0.074)]
    pooled = MetricResult.measured(
        "warp_error", list(base), *map(list, runs), unit="", higher_is_better=False,
        role=Role.TARGET,
    )  # fmt: skip
    low, high = pooled.relative_interval or (0, 0)
    assert low < -0.5 and high > 0 and not pooled.improved
    assert pooled.difference.runs == 3


def test_other_targets_are_called_better() -> None:
    metrics = [
        metric("aesthetic_score", Role.TARGET, -0.3),
        metric("dynamic_degree", Role.MOTION, 0.0),
    ]
    assert "the videos are better and" in judge_evaluation(metrics).headline


def test_too_few_prompts_give_no_verdict() -> None:
    metrics = [metric("warp_error", Role.TARGET, -0.3, n=7)]
    verdict = judge_evaluation(metrics)
    assert verdict.outcome is Outcome.TOO_FEW
    assert "7 prompts were evaluated, and a verdict needs 8" in verdict.headline
    assert judge_evaluation(metrics, min_prompts=7).outcome is Outcome.UNPROVEN
    # Several videos of one prompt are one sample.
    base = list(np.linspace(1, 2, 16))
    few = MetricResult.measured(
        "warp_error", base, [value / 2 for value in base], unit="", higher_is_better=False,
        role=Role.TARGET, prompts=["a", "b"] * 8,
    )  # fmt: skip
    verdict = judge_evaluation([few])
    assert verdict.outcome is Outcome.TOO_FEW
    assert "the 16 videos have 2 different prompts" in verdict.headline
    assert "--prompts FILE" in verdict.headline


def test_the_rules_state_every_threshold() -> None:
    metrics = [
        metric("warp_error", Role.TARGET, -0.3),
        metric("dynamic_degree", Role.MOTION, 0.0, tolerance=0.005),
    ]
    text = rules(metrics, 8)
    for wanted in ("changed by at least 2%.", "a loss of more than 0.5%.", "needs 8 prompts"):
        assert wanted in text
    metrics.append(metric("frame_difference", Role.TARGET, 0.0, min_effect=0.05))
    assert "at least 2% (warp error), 5% (frame difference)." in rules(metrics, 8)
    assert "kept" not in rules(metrics[:1], 8)


def test_one_training_seed_is_said_to_be_one() -> None:
    details = judge_evaluation([metric("warp_error", Role.TARGET, -0.3)], trained_on=5).details
    assert any("one training run" in text for text in details)
    assert "5 of the 47 prompts are also prompts of the training pairs." in details


def test_few_prompts_are_stated() -> None:
    verdict = judge_evaluation([metric("warp_error", Role.TARGET, -0.3, n=9)])
    assert any("With 9 prompts the intervals are rough" in text for text in verdict.details)


def test_the_details_give_the_numbers() -> None:
    one = metric("warp_error", Role.TARGET, -0.25)
    (sentence, *_) = judge_evaluation([one]).details
    assert sentence.startswith(f"Warp error fell from {brief(one.difference.base_mean)} to ")
    assert "95% interval" in sentence and "25.0%" in sentence and sentence.endswith(": better.")


def test_a_verdict_needs_a_target() -> None:
    with pytest.raises(ValueError, match="target"):
        judge_evaluation([metric("dynamic_degree", Role.MOTION, 0.0)])


def test_the_interval_that_is_shown_decides() -> None:
    """One base value of a hundred times the others: the relative change is unknown."""
    base = [100.0, *(1.0 + 0.1 * i for i in range(11))]
    tuned = [value - 0.5 - 0.01 * i for i, value in enumerate(base)]
    metric = MetricResult.measured(
        "warp_error", base, tuned, unit="", higher_is_better=False, role=Role.TARGET, min_effect=0
    )
    assert metric.interval[1] < 0 < metric.deciding[1]
    assert not metric.clear and not metric.improved
    assert "better" not in judge_evaluation([metric]).details[0]


def test_a_change_that_few_videos_decide_is_told_with_the_typical_one() -> None:
    def uneven(base: list[float], tuned: list[float]) -> str:
        return MetricResult.measured(
            "warp_error", base, tuned, unit="", higher_is_better=False, role=Role.TARGET
        ).unevenness

    even = [5.0] * 10
    # Eight videos halve; the two with most of the error rise by a tenth, and the mean with them.
    base, tuned = [5.0] * 8 + [100.0, 100.0], [2.5] * 8 + [110.0, 110.0]
    typical = (0.5**8 * 1.1**2) ** 0.1 - 1
    assert uneven(base, tuned) == (
        "2 of the 10 videos have 88% of the warp error, and decide its change. The typical change, "
        f"the geometric mean of the videos' ratios, is {percent(typical)}."
    )
    assert f"{typical:.3f}" == "-0.415"
    assert uneven(even, even) == ""
    assert uneven([0.0, *base], [0.0, *tuned]) == ""  # a ratio of zeros
    result = MetricResult.measured(
        "warp_error", base, tuned, unit="", higher_is_better=False, role=Role.TARGET
    )
    assert result.unevenness in judge_evaluation([result]).details


def test_a_smaller_frame_difference_alone_is_not_called_smoother() -> None:
    outcome, headline = judge(difference=-0.2)
    assert outcome is Outcome.IMPROVED
    assert headline.startswith("Improved: the videos change less from frame to frame and move")


def test_what_rises_in_every_video_is_worse_though_the_base_is_uneven() -> None:
    base = [0.3, 0.5, 20.0, 0.4, 12.0, 0.2, 0.6, 0.4]
    tuned = [value + rise for value, rise in zip(base, (8, 9, 5, 7, 4, 5, 7, 3), strict=True)]
    shaken = MetricResult.measured(
        "frame_difference", base, tuned, unit="", higher_is_better=False, role=Role.TARGET
    )
    assert shaken.interval[0] > 0 > shaken.deciding[0]
    verdict = judge_evaluation([shaken])
    assert verdict.headline == "Worse: frame difference rose."
    low, high = (brief(end) for end in shaken.interval)
    assert (
        f"The interval of the difference in frame difference ({low} to {high}) excludes zero, that "
        "of the relative change does not: the base's values are uneven."
    ) in verdict.details
    turned = shaken.model_copy(update={"higher_is_better": True})
    assert not turned.improved and not turned.worsened  # a gain needs the deciding interval


def test_the_witness_of_a_motion_metric_is_asked_what_the_verdict_asks() -> None:
    first = metric("dynamic_degree", Role.MOTION, 0.0)
    for change, sentence in (
        (0.005, ""),
        (-0.3, "by it, the result is: worse."),
        (-0.029, "by it, the result is: not shown to be kept."),
    ):
        other = metric("dynamic_degree", Role.MOTION, change)
        witness = Witness.measured("DIS", other.base, other.tuned)
        result = first.model_copy(update={"witness": witness})
        assert result.disagreement.endswith(sentence) and bool(result.disagreement) == bool(
            sentence
        )
