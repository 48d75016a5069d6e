from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dpo_video.support.report import StepReport
from dpo_video.training.diagnosis import SHORT, WINDOW, Diagnosis, TrainingState, judge_training

SLOPE = 2500.0
Curve = Callable[[int], float]
Array = NDArray[np.float64]
# A loss and its gradient factor, of the logits of some pairs.
Kind = Callable[[Array], tuple[Array, Array]]


def logistic(logits: Array) -> tuple[Array, Array]:
    return np.logaddexp(0, -logits), np.exp(-np.logaddexp(0, logits))


def hinge(logits: Array) -> tuple[Array, Array]:
    return np.maximum(0, 1 - logits), 0.5 * (logits < 1)


def ipo(logits: Array) -> tuple[Array, Array]:
    return (1 - 2 * logits) ** 2, 0.5 * (1 - 2 * logits)


def run(
    chosen: Curve,
    rejected: Curve,
    *,
    steps: int = 60,
    slope: float = SLOPE,
    noise: float = 0.3,
    pairs: int = 4,
    terms: int = 1,
    kind: Kind = logistic,
    seed: int = 0,
) -> list[StepReport]:
    """Reports of a run whose errors change along two curves, as a loop would make them.

    Args:
        chosen: step to d(chosen), in logits (times the slope).
        rejected: step to d(rejected), in logits.
        steps: how long.
        slope: beta.
        noise: of a pair's logits, relative to their size (plus a hundredth of a logit).
        pairs: a step.
        terms: logistic terms in the loss (the region loss has two).
        kind: what they are if not logistic.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    reports = []
    for step in range(1, steps + 1):
        d_w, d_l = chosen(step - 1), rejected(step - 1)
        size = noise * (abs(d_w) + abs(d_l)) + (0.01 if step > 1 else 0.0)
        chosens = d_w + size * rng.normal(size=pairs)
        rejecteds = d_l + size * rng.normal(size=pairs)
        logits = rejecteds - chosens
        losses, factors = kind(logits)
        reports.append(
            StepReport(
                step=step,
                loss=terms * float(losses.mean()),
                margin=float(logits.mean()) / slope,
                logits=float(logits.mean()),
                accuracy=float(((logits > 0) + 0.5 * (logits == 0)).mean()),
                chosen_change=float(chosens.mean()) / slope,
                rejected_change=float(rejecteds.mean()) / slope,
                gradient_factor=float(factors.mean()),
                rejected_dominant=float(((chosens > 0) & (rejecteds > abs(chosens))).mean()),
                grad_norm=float(rng.lognormal(-1, 0.4)),
                lr=1e-4 * min(1.0, step / 10, 2 * (steps + 1 - step) / steps),
                pairs_per_second=3.0,
                memory_gib=1.5,
                seconds=1.3 * step,
                eta_seconds=1.3 * (steps - step),
            )
        )
    return reports


def grow(to: float, over: int = 60) -> Curve:
    return lambda step: to * min(1.0, step / over)


def flat(step: int) -> float:
    return 0.0


# --- each state, along a likely path ----------------------------------------------------------

HEALTHY = {
    "the chosen error falls": (grow(-0.3), grow(1.0)),
    "the rejected error alone moves": (flat, grow(1.2)),
    "the chosen error rises a little": (grow(0.15), grow(1.5)),
    "strong, not yet dead": (grow(-0.5), grow(1.8)),
    "both errors fall": (grow(-1.0), grow(-0.3)),
}
DOMINANT = {
    "both errors rise, the rejected one more": (grow(1.0), grow(2.5)),
    "both errors rise alike": (grow(2.0), grow(2.0)),
    "also saturated": (grow(5.0), grow(14.0)),
    "the chosen error rises more": (grow(2.0), grow(1.0)),
}
SATURATED = {
    "far too much slope": (grow(-3.0), grow(9.0)),
    "just dead": (flat, grow(6.0, over=40)),
}
STILL = {
    "nothing happens": (flat, flat),
    "ten times too slow": (grow(-0.01), grow(0.04)),
}


@pytest.mark.parametrize(
    ("state", "curves"),
    [
        (state, curves)
        for state, paths in (
            (TrainingState.HEALTHY, HEALTHY),
            (TrainingState.REJECTED_DOMINANT, DOMINANT),
            (TrainingState.SATURATED, SATURATED),
            (TrainingState.NOT_MOVING, STILL),
        )
        for curves in paths.values()
    ],
    ids=[*HEALTHY, *DOMINANT, *SATURATED, *STILL],
)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("terms", [1, 2])
def test_every_state_is_reached_by_its_own_path(
    state: TrainingState, curves: tuple[Curve, Curve], seed: int, terms: int
) -> None:
    verdict = judge_training(run(*curves, seed=seed, terms=terms), steps=60)
    assert verdict.state is state, verdict
    assert verdict.step == 60


def test_logits_are_the_unit_of_all_but_not_moving() -> None:
    # The same logits from a tenth of the slope are ten times the errors: the same verdict.
    for paths in (HEALTHY, DOMINANT, SATURATED):
        for curves in paths.values():
            states = {judge_training(run(*curves, slope=slope)).state for slope in (250.0, 2500.0)}
            assert len(states) == 1


def rescaled(reports: Sequence[StepReport], errors: float, slope: float) -> list[StepReport]:
    """The same run with all changes of error times `errors`, under a loss of another slope."""
    return [
        report.model_copy(
            update={
                "margin": report.margin * errors,
                "chosen_change": report.chosen_change * errors,
                "rejected_change": report.rejected_change * errors,
                "logits": report.margin * errors * slope,
                "gradient_factor": 1 / (1 + math.exp(report.margin * errors * slope)),
            }
        )
        for report in reports
    ]


@pytest.mark.parametrize("slope", [25.0, 250.0, 2500.0])
def test_a_small_slope_does_not_hide_that_the_errors_move(slope: float) -> None:
    for state, paths in ((TrainingState.HEALTHY, HEALTHY), (TrainingState.NOT_MOVING, STILL)):
        for curves in paths.values():
            reports = rescaled(run(*curves), 1.0, slope)
            assert judge_training(reports).state is state


# --- real runs -------------------------------------------------------------------------------

LOGS = Path(__file__).parents[1] / "logs"
# Each the last reports of a training of `tiny` on its own dense pairs, loss `segment` at 250.
REAL = {
    "dense-segment": TrainingState.HEALTHY,  # lr 3e-4, 70 steps: 19% less warping error
    "lr-3e-6": TrainingState.NOT_MOVING,  # 40 steps: drifts steadily, and nowhere
    "lr-1e-9": TrainingState.NOT_MOVING,  # 40 steps: rounding
}


def real(name: str) -> list[StepReport]:
    lines = (LOGS / f"{name}.jsonl").read_text().splitlines()
    return [StepReport.model_validate_json(line) for line in lines]


@pytest.mark.parametrize("name", REAL)
def test_recorded_runs_keep_their_verdicts(name: str) -> None:
    assert judge_training(real(name)).state is REAL[name]


def test_it_takes_both_a_direction_and_a_size() -> None:
    learned = real("dense-segment")
    assert judge_training(rescaled(learned, 0.1, 250)).state is TrainingState.NOT_MOVING
    signs = np.random.default_rng(0).permutation([1.0, -1.0] * (WINDOW // 2))
    aimless = [
        rescaled([report], float(sign), 250.0)[0]
        for report, sign in zip(learned, signs, strict=True)
    ]
    assert judge_training(aimless).state is TrainingState.NOT_MOVING


@pytest.mark.parametrize(("kind", "done"), [(hinge, 2.0), (ipo, 0.52)])
def test_a_loss_with_a_target_is_saturated_when_it_is_there(kind: Kind, done: float) -> None:
    # Logits of 0.5 and of 2 are nothing to a sigmoid, but all that these two ask for.
    for seed in range(5):
        there = run(flat, grow(done, over=20), kind=kind, noise=0.1, seed=seed)
        verdict = judge_training(there, steps=60)
        assert verdict.state is TrainingState.SATURATED, verdict
        # Half the slope asks for twice the margin.
        assert "loss.beta to about 1/2 of its value" in verdict.change
        on_the_way = run(flat, grow(done / 3), kind=kind, noise=0.1, seed=seed)
        assert judge_training(on_the_way).state is TrainingState.HEALTHY
        same = run(flat, grow(done, over=20), noise=0.1, seed=seed)
        assert judge_training(same).state is TrainingState.HEALTHY


@pytest.mark.parametrize(
    ("rise", "state", "words"),
    [
        (-0.2, TrainingState.HEALTHY, "judge the run by its evaluation"),
        (0.0, TrainingState.HEALTHY, "judge the run by its evaluation"),
        (0.5, TrainingState.NOT_MOVING, "(3e-5 instead of 1e-4)"),
        (9.0, TrainingState.DIVERGED, "train.learning_rate"),
    ],
)
def test_without_a_reference_only_a_clear_rise_of_the_error_is_told(
    rise: float, state: TrainingState, words: str
) -> None:
    # An error varies with the timestep, and the loss may be 100 times larger at some.
    rng = np.random.default_rng(0)
    reports = [
        report.model_copy(
            update={
                "reference": False, "compares": False, "logits": 0.0, "margin": 0.0,
                "loss": 1.0 if report.step < 5 else 100.0, "rejected_change": 0.0,
                "chosen_change": float(rng.uniform(0.1, 0.9) + rise * report.step / 60),
            }
        )
        for report in run(flat, flat)
    ]  # fmt: skip
    verdict = judge_training(reports)
    assert verdict.state is state and words in verdict.change, verdict
    comparing = [report.model_copy(update={"compares": True}) for report in reports]
    verdict = judge_training(comparing)
    assert (verdict.state is TrainingState.REJECTED_DOMINANT) == (rise == 0.5), verdict
    if state is not TrainingState.DIVERGED:
        assert "reward accuracy" in verdict.seen


def test_the_advice_names_no_option_that_the_loss_lacks() -> None:
    for curves in (*DOMINANT.values(), *SATURATED.values(), *STILL.values()):
        assert "loss." not in judge_training(run(*curves), options=()).change


@pytest.mark.parametrize(("share", "moved"), [(0.5, False), (0.9, True)])
def test_one_outlier_does_not_hide_what_the_other_pairs_agree_on(share: float, moved: bool) -> None:
    rng = np.random.default_rng(0)
    reports = []
    for report in run(flat, flat, pairs=2):
        signs = np.where(rng.random(2) < share, 1.0, -1.0)
        sizes = rng.lognormal(1, 2, size=2) + (200 if report.step == 55 else 0)
        logits = float((signs * sizes).mean()) + (100 if report.step == 55 else 0)
        update = {
            "logits": logits, "margin": logits / SLOPE, "accuracy": float((signs > 0).mean()),
            "gradient_factor": 0.3,
        }  # fmt: skip
        reports.append(report.model_copy(update=update))
    assert (judge_training(reports).state is TrainingState.HEALTHY) == moved


def test_noise_around_nothing_is_no_progress_and_no_harm() -> None:
    states = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        wild = [
            report.model_copy(
                update={"logits": w - c, "chosen_change": c / SLOPE, "margin": (w - c) / SLOPE}
            )
            for report in run(flat, flat)
            for c, w in [rng.normal(0, 0.7, 2)]
        ]
        verdict = judge_training(wild)
        states.append(verdict.state)
        if verdict.state is TrainingState.NOT_MOVING:
            assert "train.gradient_accumulation_steps" in verdict.change
    assert states.count(TrainingState.NOT_MOVING) > 90


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["loss", "margin", "chosen_change"])
@pytest.mark.parametrize("at", [3, 41])
def test_what_is_not_finite_has_diverged_at_its_step(field: str, value: float, at: int) -> None:
    reports = run(*HEALTHY["the rejected error alone moves"])
    for index in range(at - 1, min(at + 5, 60)):
        reports[index] = reports[index].model_copy(update={field: value})
    verdict = judge_training(reports[: at + 5])
    assert (verdict.state, verdict.step) == (TrainingState.DIVERGED, at)
    assert f"step {at}" in verdict.seen
    assert "train.learning_rate" in verdict.change and "train.mixed_precision" in verdict.change


def test_an_explosion_is_named_with_its_step() -> None:
    def burst(step: int) -> float:
        return 0.02 * step if step < 40 else 2000.0 * 1.3 ** (step - 40)

    reports = run(burst, lambda step: 0.03 * step if step < 40 else 1.1 * burst(step), noise=0.05)
    assert judge_training(reports[:40]).state is TrainingState.REJECTED_DOMINANT
    verdict = judge_training(reports)
    assert (verdict.state, verdict.step) == (TrainingState.DIVERGED, 41)
    assert "checkpoint well before step 41" in verdict.change


def test_a_loss_that_explodes_while_errors_stay_small_has_diverged() -> None:
    wrong = run(lambda step: 0.0 if step < 30 else 30.0, lambda step: 0.02 * step, noise=0.05)
    verdict = judge_training(wrong)
    assert (verdict.state, verdict.step) == (TrainingState.DIVERGED, 31)


def test_a_single_bad_step_does_not_hide_a_later_divergence() -> None:
    reports = run(*HEALTHY["the rejected error alone moves"])
    reports[0] = reports[0].model_copy(update={"loss": math.nan})
    assert judge_training(reports).state is TrainingState.HEALTHY
    reports[50:] = [report.model_copy(update={"chosen_change": 3.0}) for report in reports[50:]]
    verdict = judge_training(reports)
    assert (verdict.state, verdict.step) == (TrainingState.DIVERGED, 51)


def test_one_wild_step_is_no_explosion() -> None:
    reports = run(*HEALTHY["the rejected error alone moves"])
    reports[57] = reports[57].model_copy(update={"loss": 40.0})
    assert judge_training(reports).state is TrainingState.HEALTHY


def test_a_loss_scaler_may_skip_some_steps_but_not_all() -> None:
    reports = run(*HEALTHY["the rejected error alone moves"])
    some = [
        report.model_copy(update={"grad_norm": math.inf}) if report.step > 50 else report
        for report in reports
    ]
    assert judge_training(some).state is TrainingState.HEALTHY
    every = [report.model_copy(update={"grad_norm": math.inf}) for report in run(flat, flat)]
    verdict = judge_training(every)
    assert verdict.state is TrainingState.DIVERGED and "train.mixed_precision" in verdict.change


# --- asked live ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, WINDOW - 1])
def test_it_is_too_early_to_judge_a_few_steps(steps: int) -> None:
    verdict = judge_training(run(flat, flat, steps=steps), steps=1000)
    assert (verdict.state, verdict.step) == (TrainingState.TOO_EARLY, steps)


def states_along(reports: Sequence[StepReport]) -> list[TrainingState]:
    """The states in the order in which a loop that asks at every step would print them."""
    states: list[TrainingState] = []
    diagnosis = Diagnosis(len(reports))
    for report in reports:
        diagnosis.add(report)
        state = diagnosis.verdict().state
        if not states or states[-1] is not state:
            states.append(state)
    return states


def test_a_step_costs_the_same_however_long_the_run_is() -> None:
    diagnosis = Diagnosis()
    for report in run(grow(-0.3), grow(1.0), steps=10 * WINDOW):
        diagnosis.add(report)
    kept = [len(value) for value in vars(diagnosis).values() if isinstance(value, (list, deque))]
    assert sorted(kept) == [SHORT, WINDOW, WINDOW]


@pytest.mark.parametrize("steps", [None, 60])
def test_the_verdict_at_every_step_is_that_of_the_log_so_far(steps: int | None) -> None:
    for paths in (HEALTHY, DOMINANT, SATURATED, STILL):
        for curves in paths.values():
            reports, diagnosis = run(*curves), Diagnosis(steps)
            for count, report in enumerate(reports, start=1):
                diagnosis.add(report)
                if count % 7 in (0, 4):
                    assert diagnosis.verdict() == judge_training(reports[:count], steps=steps)


def test_a_slow_start_is_given_time() -> None:
    slow = run(grow(-0.2, over=1000), grow(1.0, over=1000), steps=1000)
    assert judge_training(slow[:60]).state is TrainingState.NOT_MOVING
    assert states_along(slow) == [TrainingState.TOO_EARLY, TrainingState.HEALTHY]


def test_a_still_run_is_not_called_healthy_while_it_is_given_time() -> None:
    verdict = judge_training(run(flat, flat, steps=WINDOW), steps=WINDOW + 5)
    assert verdict.state is TrainingState.TOO_EARLY and "No change needed yet" in verdict.change
    assert judge_training(run(flat, flat, steps=WINDOW), steps=WINDOW).state is not verdict.state


def test_the_verdict_turns_once_when_the_run_does() -> None:
    too_far = run(lambda step: -0.01 * step, lambda step: 0.03 * step, steps=200)
    assert states_along(too_far) == [
        TrainingState.TOO_EARLY,
        TrainingState.HEALTHY,
        TrainingState.SATURATED,
    ]


# --- the words -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curves", "options"),
    [
        (
            STILL["nothing happens"],
            ("train.learning_rate (3e-4 instead of 1e-4)", "train.steps", "loss.beta"),
        ),
        (SATURATED["just dead"], ("loss.beta to about", "train.steps")),
        (
            DOMINANT["both errors rise alike"],
            ("train.learning_rate (3e-5 instead of 1e-4)", "sft_weight"),
        ),
        (HEALTHY["the rejected error alone moves"], ("more steps would still help",)),
    ],
)
def test_the_advice_names_options(curves: tuple[Curve, Curve], options: Sequence[str]) -> None:
    verdict = judge_training(run(*curves))
    for wanted in options:
        assert wanted in verdict.change
    assert (verdict.state is TrainingState.HEALTHY) == verdict.seen.startswith("Reward accuracy ")
    for sentence in (verdict.seen, verdict.change):
        assert sentence.endswith(".") and sentence[0].isupper()
        assert any(character.isdigit() for character in verdict.seen)
