"""Diagnosis of a training from the reports of its steps, in words. Imports no torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from dpo_video.support.formatting import brief, counted, option
from dpo_video.support.report import StepReport
from dpo_video.support.statistics import Record

WINDOW = 20
"""Reports in a verdict's window. One report is a few pairs at random timesteps and its margin is
mostly noise; the standard error over 20 is 4.5 times smaller."""
SHORT = 5
"""Reports that distinguish divergence from one hard batch, early enough to stop the run."""
MOVED = 0.1
"""Logits below which nothing was learned: sigmoid(0.1) is 52.5%, and the loss at least 0.644."""
LEARNED = 4e-5
"""Margin from which something was learned even so: MOVED at the slope of 2500 of most published
losses. A loss of a smaller slope (`segment`: 250) learns as much, since AdamW's steps do not depend
on it, and shows it in fewer logits: `dense-segment` on `tiny` lowered the warping error by 19% at
0.018 logits, a margin of 7e-5 that was 3.6 standard errors from zero. Significance alone is not
enough: a steady drift is clear of zero at any learning rate."""
DEAD = 0.05
"""Gradient factor below which training is over: a tenth of the initial 0.5 (loss 0.05, logits 3). A
mean below it leaves no room for even one pair in ten that is not learned yet."""
CHOSEN_SHARE = 0.25
"""Rise of the chosen error, as a share of the margin, that is more than a side effect. Almost every
run has some; from a quarter on, samples follow the chosen error rather than the margin."""
EXPLODED_LOSS = 10.0
"""Multiple of the initial loss: 6.9 for a logistic loss, 10 for a hinge."""
EXPLODED_CHANGE = 0.5
"""Rise of a mean squared error. Targets (epsilon, v, velocity) have a variance of 1 to 2, so a
network that predicts nothing has an error of about 1."""
EXPLODED_ERROR = 3.0
"""A mean squared error, where no reference tells its rise."""
CLEAR = 2.0
"""Standard errors that a mean must be away from zero to count as such."""


class TrainingState(StrEnum):
    """State of a run."""

    TOO_EARLY = "too_early"
    NOT_MOVING = "not_moving"
    SATURATED = "saturated"
    REJECTED_DOMINANT = "rejected_dominant"
    DIVERGED = "diverged"
    HEALTHY = "healthy"


class TrainingVerdict(Record):
    """A run's state, the evidence for it, and what to change."""

    state: TrainingState
    step: int
    """The step that it is about: the last one, or the one at which training diverged."""
    seen: str
    """One sentence with numbers."""
    change: str
    """One sentence that names the option to change, if any."""


class Diagnosis:
    """Judges a run while it goes on, with constant work and memory per step.

    Several states can hold at once; the verdict is the one to act on first: diverged, then
    rejected_dominant (more steps do harm), saturated (more steps change nothing), not_moving.
    """

    def __init__(
        self, steps: int | None = None, *, options: Collection[str] = ("beta", "sft_weight")
    ) -> None:
        """Start without reports.

        Args:
            steps: How many the run will have. With it, a run is not called "not moving" before a
                quarter of them; without, it is judged as if it ended now.
            options: Names of the loss's options. No other is named in the advice.
        """
        self._steps, self._options = steps, frozenset(options)
        self._count, self._peak_lr = 0, 0.0
        self._logits = self._margins = 0.0
        self._first: list[StepReport] = []
        self._window: deque[StepReport] = deque(maxlen=WINDOW)
        self._recent: deque[tuple[float, StepReport]] = deque(maxlen=SHORT)
        self._start = math.nan
        self._nonfinite: StepReport | None = None
        self._onset: StepReport | None = None

    def add(self, report: StepReport) -> None:
        """Take the report of the next step; skipped steps are ignored."""
        if report.skipped:
            return
        if not self._count:
            self._start = report.loss
        self._count += 1
        self._peak_lr = max(self._peak_lr, report.lr)
        if math.isfinite(report.margin) and math.isfinite(report.logits):
            self._logits += abs(report.logits)
            self._margins += abs(report.margin)
        if self._nonfinite is None and not _is_finite(report):
            self._nonfinite = report
        if len(self._first) < WINDOW:
            self._first.append(report)
        self._window.append(report)
        self._recent.append((self._excess(report), report))
        if self._onset is None and self._exceeds:
            self._onset = next(report for excess, report in self._recent if excess > 1)

    def verdict(self) -> TrainingVerdict:
        """The verdict after the reports so far."""
        if diverged := self._diverged():
            return diverged
        if self._count < WINDOW:
            return TrainingVerdict(
                state=TrainingState.TOO_EARLY,
                step=self._window[-1].step if self._window else 0,
                seen=f"The run has made {counted(self._count, 'step')}, and a verdict needs "
                f"{WINDOW}.",
                change=f"Set train.steps to {WINDOW} or more for a verdict."
                if (self._steps or self._count) < WINDOW
                else "No change needed.",
            )
        view = _View.of(self._window, slope=self._slope, lr=self._peak_lr)
        # Warm-up and the first steps are flat in every run, and slow settings stay so for long.
        planned = self._steps or self._count
        patient = self._count < min(planned, max(2 * WINDOW, planned // 4))
        if not self._window[-1].reference:
            start = _View.of(self._first, slope=self._slope, lr=self._peak_lr)
            if view.factor >= DEAD:
                return _without_reference(view, start, compares=self._window[-1].compares)
        elif view.chosen_is_worse:
            return _rejected_dominant(view, self._options)
        if view.factor < DEAD:
            return _saturated(view, self._options)
        if view.moved:
            return _healthy(view)
        if patient:
            return TrainingVerdict(
                state=TrainingState.TOO_EARLY,
                step=view.step,
                seen=f"The policy does not differ clearly from the reference yet (logits "
                f"{brief(view.logits.mean)} on average, reward accuracy {view.accuracy:.0%}).",
                change="No change needed yet.",
            )
        return _not_moving(view, self._options)

    @property
    def _slope(self) -> float:
        """Logits per margin: twice the loss's slope at margin 0, `beta` for a sigmoid loss."""
        return float(self._logits / self._margins) if self._margins else 1.0

    @property
    def _initial_loss(self) -> float:
        return max(math.log(2), self._start)  # a loss that starts at 0 has no multiple

    def _excess(self, report: StepReport) -> float:
        """How far a report is beyond the limits; 1 is the limit."""
        if not _is_finite(report):
            return math.inf
        rise = max(report.chosen_change, report.rejected_change)
        if not report.reference:  # the loss may be an error too, which follows the timesteps
            return rise / EXPLODED_ERROR
        return max(report.loss / (EXPLODED_LOSS * self._initial_loss), rise / EXPLODED_CHANGE)

    @property
    def _exceeds(self) -> bool:
        """Whether the last reports are beyond the limits, by their median."""
        sizes = [excess for excess, _ in self._recent]
        return len(sizes) == SHORT and bool(np.median(sizes) > 1)

    def _diverged(self) -> TrainingVerdict | None:
        window, lr = self._window, self._peak_lr
        if self._nonfinite is not None and any(not _is_finite(report) for report in window):
            first = self._nonfinite
            return TrainingVerdict(
                state=TrainingState.DIVERGED,
                step=first.step,
                seen=f"At step {first.step} the loss became {first.loss} and the margin "
                f"{first.margin}.",
                change=f"Lower train.learning_rate ({_less(lr)} instead of {option(lr)}), and set "
                'train.mixed_precision to "bf16" or "no" if it is "fp16"; no checkpoint after that '
                "step is usable.",
            )
        # A loss scaler skips a few steps while it finds its scale, never a whole window.
        if len(window) == WINDOW and all(not math.isfinite(each.grad_norm) for each in window):
            return TrainingVerdict(
                state=TrainingState.DIVERGED,
                step=window[0].step,
                seen=f"The gradient has not been finite since step {window[0].step}, so that no "
                "step changed the weights.",
                change='Set train.mixed_precision to "bf16" or "no".',
            )
        if self._onset is None or not self._exceeds:
            return None
        first, last = self._onset, window[-1]
        return TrainingVerdict(
            state=TrainingState.DIVERGED,
            step=first.step,
            seen=f"Training diverged at step {first.step}: the loss is {brief(last.loss)} "
            f"({brief(self._initial_loss)} at the start), and the chosen error has changed by "
            f"{_signed(last.chosen_change)}, the rejected error by "
            f"{_signed(last.rejected_change)} against the reference; a network that predicts "
            "nothing has an error of about 1."
            if last.reference
            else f"Training diverged at step {first.step}: the chosen error is "
            f"{brief(last.chosen_change)}; a network that predicts nothing has about 1.",
            change=f"Lower train.learning_rate ({_less(lr)} instead of {option(lr)}) and start "
            f"again, or resume from a checkpoint well before step {first.step}.",
        )


def judge_training(
    reports: Iterable[StepReport],
    *,
    steps: int | None = None,
    options: Collection[str] = ("beta", "sft_weight"),
) -> TrainingVerdict:
    """Judge a run by all of its reports, oldest first; arguments as for `Diagnosis`."""
    diagnosis = Diagnosis(steps, options=options)
    for report in reports:
        diagnosis.add(report)
    return diagnosis.verdict()


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
    """Means over the last reports."""

    step: int
    lr: float
    """The learning rate between warm-up and decay."""
    slope: float
    margin: float
    logits: _Smoothed
    advantage: _Smoothed
    """Reward accuracy above chance."""
    chosen: _Smoothed
    rejected: float
    factor: float
    dominant: float

    @classmethod
    def of(cls, window: Iterable[StepReport], *, slope: float, lr: float) -> _View:
        reports = list(window)

        def mean(value: Callable[[StepReport], float]) -> float:
            return float(np.mean([value(report) for report in reports]))

        return cls(
            step=reports[-1].step,
            lr=lr,
            slope=slope,
            margin=mean(lambda report: report.margin),
            logits=_Smoothed.of([report.logits for report in reports]),
            advantage=_Smoothed.of([report.accuracy - 0.5 for report in reports]),
            chosen=_Smoothed.of([report.chosen_change for report in reports]),
            rejected=mean(lambda report: report.rejected_change),
            factor=mean(lambda report: report.gradient_factor),
            dominant=mean(lambda report: report.rejected_dominant),
        )

    @property
    def accuracy(self) -> float:
        return self.advantage.mean + 0.5

    @property
    def least(self) -> float:
        """Logits that count as moving: fewer for a smaller slope."""
        return min(MOVED, LEARNED * self.slope)

    @property
    def moved(self) -> bool:
        # The logits of single pairs have heavy tails: one can hide what all others agree on.
        clear = self.logits.is_clearly_positive or self.advantage.is_clearly_positive
        return self.logits.mean >= self.least and clear

    @property
    def chosen_is_worse(self) -> bool:
        """Whether the chosen error rose significantly, enough to count, and much for the margin."""
        return (
            self.chosen.is_clearly_positive
            and self.slope * self.chosen.mean >= self.least
            and self.chosen.mean >= CHOSEN_SHARE * self.margin
        )


def _without_reference(view: _View, start: _View, *, compares: bool) -> TrainingVerdict:
    """Judge by the errors themselves, against those of the first steps.

    They follow the timesteps that were drawn, so that only a clear rise is told.
    """

    def both(now: float, before: float, form: Callable[[float], str] = brief) -> str:
        return f"{form(now)} ({form(before)} over the first {WINDOW} steps)"

    seen = f"chosen error {both(view.chosen.mean, start.chosen.mean)}"
    if compares:
        seen += (
            f", rejected {both(view.rejected, start.rejected)}, reward accuracy "
            f"{both(view.accuracy, start.accuracy, '{:.0%}'.format)}"
        )
    rise = view.chosen.mean - start.chosen.mean
    if rise > CLEAR * math.hypot(view.chosen.error, start.chosen.error):
        return TrainingVerdict(
            state=TrainingState.REJECTED_DOMINANT if compares else TrainingState.NOT_MOVING,
            step=view.step,
            seen=f"The chosen videos are predicted worse: {seen}.",
            change=f"Lower train.learning_rate ({_less(view.lr)} instead of {option(view.lr)}) or "
            "train.steps.",
        )
    return TrainingVerdict(
        state=TrainingState.HEALTHY,
        step=view.step,
        seen=f"{seen[0].upper()}{seen[1:]}.",
        change="No change needed; without a reference these errors vary with the timesteps, so "
        "judge the run by its evaluation.",
    )


def _rejected_dominant(view: _View, options: Collection[str]) -> TrainingVerdict:
    weight = 10 ** round(math.log10(max(view.slope * view.factor, 1.0)))
    pull = (
        f", or set loss.sft_weight to about {weight} (it must balance the loss's slope times the "
        "gradient factor)"
    )
    return TrainingVerdict(
        state=TrainingState.REJECTED_DOMINANT,
        step=view.step,
        seen=f"The chosen videos are predicted worse: chosen error {_signed(view.chosen.mean)}, "
        f"rejected {_signed(view.rejected)} against the reference, so that reward accuracy is "
        f"{view.accuracy:.0%} while {view.dominant:.0%} of pairs owe it to the rejected error "
        "alone.",
        change=f"Lower train.learning_rate ({_less(view.lr)} instead of {option(view.lr)}) or "
        f"train.steps{pull if 'sft_weight' in options else ''}.",
    )


def _saturated(view: _View, options: Collection[str]) -> TrainingVerdict:
    # The beta at which the margin reached would give logits of 1; for a loss with a target (hinge,
    # ipo), one that asks for a few times the margin.
    divisor = option(_round(max(view.logits.mean, 2.0)))
    return TrainingVerdict(
        state=TrainingState.SATURATED,
        step=view.step,
        seen=f"The gradient factor is {view.factor:.3f}, of 0.5 at the start, at logits of "
        f"{brief(view.logits.mean)}: the loss is satisfied and hardly changes the policy.",
        change=f"To change the videos further, lower loss.beta to about 1/{divisor} of its value; "
        "otherwise fewer train.steps give the same result."
        if "beta" in options
        else "Fewer train.steps give the same result.",
    )


def _not_moving(view: _View, options: Collection[str]) -> TrainingVerdict:
    # Either the margins are tiny, or they cancel.
    if view.logits.error >= view.least:
        return TrainingVerdict(
            state=TrainingState.NOT_MOVING,
            step=view.step,
            seen=f"Logits vary between pairs, {brief(view.logits.mean)} on average, and reward "
            f"accuracy is {view.accuracy:.0%}.",
            change="The pairs do not agree on a direction: inspect them, build more (build.count), "
            "average over more (train.gradient_accumulation_steps), or lower train.learning_rate "
            f"({_less(view.lr)} instead of {option(view.lr)}).",
        )
    return TrainingVerdict(
        state=TrainingState.NOT_MOVING,
        step=view.step,
        seen=f"Logits are {brief(view.logits.mean)} on average, too small for the policy to differ "
        "from the reference.",
        # AdamW divides the gradient by its own size, so while the loss is flat a larger beta
        # alone does not make the steps longer.
        change=f"Raise train.learning_rate ({_more(view.lr)} instead of {option(view.lr)}) or "
        "train.steps"
        + (
            " first, since AdamW's steps do not grow with beta while the loss is flat; then "
            "loss.beta."
            if "beta" in options
            else "."
        ),
    )


def _healthy(view: _View) -> TrainingVerdict:
    return TrainingVerdict(
        state=TrainingState.HEALTHY,
        step=view.step,
        # Not the loss: with an SFT term, it follows the timesteps that were drawn.
        seen=f"Reward accuracy {view.accuracy:.0%}; chosen error {_signed(view.chosen.mean)}, "
        f"rejected {_signed(view.rejected)} against the reference.",
        change=f"No change needed; at a gradient factor of {view.factor:.2f}, more steps would "
        "still help.",
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
    """Round to one significant digit, the precision of advice."""
    return float(f"{value:.0e}")


def _signed(value: float) -> str:
    return ("" if value < 0 else "+") + brief(value)
