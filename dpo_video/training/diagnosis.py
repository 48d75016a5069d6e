"""Is this training working? A judgement in words, from the reports of its steps.

No torch here: the loop asks while it runs, the command line and the page ask afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from dpo_video.support.formatting import brief, option
from dpo_video.support.statistics import Record

WINDOW = 20
"""Reports that a judgement looks back on. One report is a few pairs at random noise levels and its
margin is mostly noise; over 20 the standard error is 4.5 times smaller."""
SHORT = 5
"""Reports that tell an explosion from one hard batch, soon enough to stop it."""
MOVED = 0.1
"""Logits under which nothing was learned yet: sigmoid(0.1) = 52.5% is a coin, and the loss is then
0.644 or more."""
LEARNED = 4e-5
"""Margin from which something was learned even so: what MOVED is at the slope of 2500 that most
losses are published with. A loss of a smaller slope (`segment`: 250) learns as much, since AdamW's
steps do not grow with it, and shows it in fewer logits: `dense-segment` on `tiny` took 19% off the
warping error at 0.018 logits, a margin of 7e-5 that was 3.6 standard errors from zero. Chance alone
does not tell enough: a steady drift is clear of zero at any learning rate."""
DEAD = 0.05
"""Gradient factor under which training is over: a tenth of the 0.5 that it starts from (loss 0.05,
logits 3). A mean below it leaves no room for even one pair in ten that is still unlearned."""
WINNER_SHARE = 0.25
"""Rise of the chosen error, as a share of the margin, that is no longer a side effect. Nearly every
run pays something here; from a quarter on, samples follow the winner's error rather than the
margin."""
EXPLODED_LOSS = 10.0
"""Times its start. For a logistic loss that is 6.9, for a hinge 10: certain, and wrong."""
EXPLODED_CHANGE = 0.5
"""Rise of a mean squared error. Targets (epsilon, v, velocity) have a variance of 1 to 2, so a
network that predicts nothing at all is off by about 1."""
CLEAR = 2.0
"""Standard errors that a mean must be away from zero to count as such."""


class StepReport(Record):
    """One optimizer step, as means over its pairs."""

    step: int
    """Optimizer steps done, from 1."""
    loss: float
    margin: float
    """Implicit reward of the chosen less that of the rejected: a difference of mean squared
    errors."""
    logits: float
    """beta * margin: what a sigmoid loss sees."""
    accuracy: float
    """Share of pairs with a margin above 0; a margin of exactly 0 counts half."""
    chosen_change: float
    """d(chosen): how much larger than the reference's the policy's error on the chosen video is."""
    rejected_change: float
    """d(rejected)."""
    gradient_factor: float
    """How hard the loss pushes on the margin: 0.5 at the start, 0 when no more. For a sigmoid loss
    the mean of sigmoid(-logits); below 0 where a loss that has a target pulls the margin back."""
    loser_dominant: float
    """Share of pairs with d(chosen) > 0 and d(rejected) > |d(chosen)|: the margin grows although
    the winner gets worse (Diffusion-SDPO)."""
    grad_norm: float
    """Before clipping. Not finite where a loss scaler skipped the step."""
    lr: float
    pairs_per_second: float
    memory_gib: float
    """Peak so far, GiB."""
    seconds: float
    """Since training began."""
    eta_seconds: float
    """Expected to the end."""
    skipped: bool = False
    """Whether nothing was learned from it, because a number in it was not finite."""


class TrainingState(StrEnum):
    """What a run is doing."""

    TOO_EARLY = "too_early"
    NOT_MOVING = "not_moving"
    SATURATED = "saturated"
    LOSER_DOMINANT = "loser_dominant"
    DIVERGED = "diverged"
    HEALTHY = "healthy"


class TrainingVerdict(Record):
    """A run's state, what shows it, and what to change."""

    state: TrainingState
    step: int
    """The step that it is about: the last one, or the one at which training diverged."""
    seen: str
    """One sentence with numbers."""
    change: str
    """One sentence that names the option."""


def judge_training(
    reports: Sequence[StepReport], *, slope: float, steps: int | None = None
) -> TrainingVerdict:
    """Judge a run by its last reports; may be asked after any step.

    Several things can be true at once; the verdict is the one to act on first: diverged, then
    loser_dominant (more of the same does harm), saturated (more does nothing), not_moving.

    Args:
        reports: all reports so far, oldest first.
        slope: the loss's slope on the margin (`beta`), to express errors in logits.
        steps: how many the run will have. With it, a run is not called "not moving" before a
            quarter of them; without, it is judged as if it ended here.
    """
    reports = [report for report in reports if not report.skipped]
    if exploded := _diverged(reports):
        return exploded
    if len(reports) < WINDOW:
        return TrainingVerdict(
            state=TrainingState.TOO_EARLY,
            step=reports[-1].step if reports else 0,
            seen=f"Only {len(reports)} steps so far, and a judgement looks back on {WINDOW}.",
            change=f"Nothing yet; a run needs train.steps of {WINDOW} or more to be judged.",
        )
    view = _View.of(reports, start=reports[0].loss, slope=slope)
    # Warm-up and the first real steps are flat in every run, and slow settings stay so for long.
    planned = steps or len(reports)
    patient = len(reports) < min(planned, max(2 * WINDOW, planned // 4))
    if view.winner_is_worse:
        return _loser_dominant(view)
    if view.factor < DEAD:
        return _saturated(view)
    if not view.moved and not patient:
        return _not_moving(view)
    return _healthy(view)


@dataclass(frozen=True, kw_only=True)
class _Smoothed:
    mean: float
    error: float
    """Standard error of the mean."""

    @classmethod
    def of(cls, values: Sequence[float]) -> _Smoothed:
        array = np.asarray(values, dtype=np.float64)
        return cls(mean=float(array.mean()), error=float(array.std(ddof=1)) / math.sqrt(len(array)))

    @property
    def is_clearly_positive(self) -> bool:
        return self.mean > CLEAR * self.error


@dataclass(frozen=True, kw_only=True)
class _View:
    """The trailing window, smoothed."""

    last: StepReport
    lr: float
    """Where it stands between warm-up and decay, as the option says."""
    start: float
    slope: float
    loss: float
    margin: float
    logits: _Smoothed
    accuracy: float
    chosen: _Smoothed
    rejected: float
    factor: float
    dominant: float

    @classmethod
    def of(cls, reports: Sequence[StepReport], *, start: float, slope: float) -> _View:
        window = reports[-WINDOW:]

        def mean(value: Callable[[StepReport], float]) -> float:
            return float(np.mean([value(report) for report in window]))

        return cls(
            last=window[-1],
            lr=_peak(reports),
            start=start,
            slope=slope,
            loss=mean(lambda report: report.loss),
            margin=mean(lambda report: report.margin),
            logits=_Smoothed.of([report.logits for report in window]),
            accuracy=mean(lambda report: report.accuracy),
            chosen=_Smoothed.of([report.chosen_change for report in window]),
            rejected=mean(lambda report: report.rejected_change),
            factor=mean(lambda report: report.gradient_factor),
            dominant=mean(lambda report: report.loser_dominant),
        )

    @property
    def least(self) -> float:
        """Logits that count as moving: the fewer, the smaller the slope."""
        return min(MOVED, LEARNED * self.slope)

    @property
    def moved(self) -> bool:
        return self.logits.mean >= self.least and self.logits.is_clearly_positive

    @property
    def winner_is_worse(self) -> bool:
        """The chosen error rose: not by chance, by as much as counts as moving, and dearly."""
        return (
            self.chosen.is_clearly_positive
            and self.slope * self.chosen.mean >= self.least
            and self.chosen.mean >= WINNER_SHARE * self.margin
        )


def _peak(reports: Sequence[StepReport]) -> float:
    """`train.learning_rate`, of which warm-up and decay are shares."""
    return max((report.lr for report in reports), default=0.0)


def _diverged(reports: Sequence[StepReport]) -> TrainingVerdict | None:
    window, recent = reports[-WINDOW:], reports[-SHORT:]
    lr = _peak(reports)
    if any(not _is_finite(report) for report in window):
        first = next(report for report in reports if not _is_finite(report))
        return TrainingVerdict(
            state=TrainingState.DIVERGED,
            step=first.step,
            seen=f"At step {first.step} the loss became {first.loss} and the margin "
            f"{first.margin}.",
            change=f"Lower train.learning_rate ({_less(lr)} instead of {option(lr)}) and set "
            "train.mixed_precision "
            'to "bf16" or "no" if it is "fp16"; nothing after that step is usable.',
        )
    # A loss scaler skips a few steps while it finds its scale, never a whole window.
    if len(window) == WINDOW and all(not math.isfinite(report.grad_norm) for report in window):
        return TrainingVerdict(
            state=TrainingState.DIVERGED,
            step=window[0].step,
            seen=f"The gradient has not been finite since step {window[0].step}, so that no step "
            "changed the weights.",
            change='Set train.mixed_precision to "bf16" or "no".',
        )
    if len(recent) < SHORT:
        return None
    # A loss that begins at 0 has no ratio to it.
    start = max(math.log(2), reports[0].loss)

    def excess(report: StepReport) -> float:
        """How far beyond the limits a report is; 1 is the limit."""
        if not _is_finite(report):  # long ago, and survived: a loss scaler skipped it
            return math.inf
        rise = max(report.chosen_change, report.rejected_change)
        return max(report.loss / (EXPLODED_LOSS * start), rise / EXPLODED_CHANGE)

    if np.median([excess(report) for report in recent]) <= 1:
        return None
    sizes = np.array([excess(report) for report in reports])
    medians = np.median(np.lib.stride_tricks.sliding_window_view(sizes, SHORT), axis=1)
    onset = int(np.argmax(medians > 1))
    first = reports[onset + int(np.argmax(sizes[onset : onset + SHORT] > 1))]
    last = reports[-1]
    return TrainingVerdict(
        state=TrainingState.DIVERGED,
        step=first.step,
        seen=f"It broke at step {first.step}: the loss is {brief(last.loss)} (it began at "
        f"{brief(start)}), and against the reference the error on the chosen videos has risen by "
        f"{brief(last.chosen_change)}, on the rejected ones by {brief(last.rejected_change)}, "
        "where a network that predicts nothing is off by about 1.",
        change=f"Lower train.learning_rate ({_less(lr)} instead of {option(lr)}) and start again, "
        f"or go on from a checkpoint well before step {first.step}.",
    )


def _loser_dominant(view: _View) -> TrainingVerdict:
    pull = 10 ** round(math.log10(max(view.slope * view.factor, 1.0)))
    return TrainingVerdict(
        state=TrainingState.LOSER_DOMINANT,
        step=view.last.step,
        seen=f"The winner is getting worse: the error on the chosen videos rose by "
        f"{brief(view.chosen.mean)}, on the rejected ones by {brief(view.rejected)}, so that "
        f"{view.accuracy:.0%} of pairs are ordered right while {view.dominant:.0%} of them owe it "
        "to the loser alone.",
        change=f"Lower train.learning_rate ({_less(view.lr)} instead of {option(view.lr)}) or "
        "train.steps, or hold the winner: loss.sft_weight of about "
        f"{pull} where the loss has one (it must weigh against beta times the gradient factor).",
    )


def _saturated(view: _View) -> TrainingVerdict:
    # The beta at which the margin that was reached would give logits of 1; for a loss that is done
    # at about 1 (hinge, ipo), the one that asks for twice the margin.
    beta = _round(view.slope / max(view.logits.mean, 2.0))
    return TrainingVerdict(
        state=TrainingState.SATURATED,
        step=view.last.step,
        seen=f"The gradient factor is {view.factor:.3f} of the 0.5 it began with (beta * margin "
        f"is {brief(view.logits.mean)}): the loss is satisfied and pushes no more.",
        change=f"If the videos should change further, lower loss.beta to about {option(beta)}; if "
        "not, fewer train.steps give the same result.",
    )


def _not_moving(view: _View) -> TrainingVerdict:
    # Two ways to stay where it began: margins that are tiny, and margins that cancel.
    if view.logits.error >= view.least:
        return TrainingVerdict(
            state=TrainingState.NOT_MOVING,
            step=view.last.step,
            seen=f"The loss stays at {brief(view.loss)}: beta * margin swings from pair to pair "
            f"but averages {brief(view.logits.mean)}, and {view.accuracy:.0%} of pairs are ordered "
            "right.",
            change="The pairs do not agree on a direction: look at them, build more "
            "(build.count), average over more (train.gradient_accumulation_steps), or lower "
            "train.learning_rate "
            f"({_less(view.lr)} instead of {option(view.lr)}).",
        )
    return TrainingVerdict(
        state=TrainingState.NOT_MOVING,
        step=view.last.step,
        seen=f"The loss stays at {brief(view.loss)} (it began at {brief(view.start)}): beta * "
        f"margin is {brief(view.logits.mean)}, too small for the policy to differ from the "
        "reference.",
        # AdamW divides the gradient by its own size, so while the loss is flat a larger beta
        # alone does not make the steps longer.
        change=f"Raise train.learning_rate ({_more(view.lr)} instead of {option(view.lr)}) or "
        "train.steps first, as AdamW's steps do not grow with beta while the loss is flat; then "
        "loss.beta.",
    )


def _healthy(view: _View) -> TrainingVerdict:
    chosen = "fell" if view.chosen.mean < 0 else "rose"
    rejected = "fell" if view.rejected < 0 else "rose"
    return TrainingVerdict(
        state=TrainingState.HEALTHY,
        step=view.last.step,
        # Not the loss: with an anchor in it, it follows the noise levels that were drawn.
        seen=f"Of the pairs, {view.accuracy:.0%} are ordered right; the error on the chosen videos "
        f"{chosen} by {brief(abs(view.chosen.mean))}, on the rejected ones it {rejected} by "
        f"{brief(abs(view.rejected))}.",
        change=f"Nothing; with a gradient factor of {view.factor:.2f} more train.steps would "
        "still move it.",
    )


def _is_finite(report: StepReport) -> bool:
    values = (
        report.loss,
        report.margin,
        report.logits,
        report.chosen_change,
        report.rejected_change,
    )
    return all(math.isfinite(value) for value in values)


def _less(lr: float) -> str:
    return option(_round(lr / 3))


def _more(lr: float) -> str:
    return option(_round(lr * 3))


def _round(value: float) -> float:
    """To one significant digit: advice is never more exact than that."""
    return float(f"{value:.0e}")
