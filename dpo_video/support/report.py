"""What a training reports after every optimizer step. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_video.support.statistics import Record


class StepReport(Record):
    """Figures of one optimizer step: means over its pairs, of all processes."""

    step: int
    """Optimizer steps done, from 1."""
    loss: float
    margin: float
    """Implicit reward of the chosen video less that of the rejected one: a difference of mean
    squared errors."""
    logits: float
    """The margin times twice the loss's slope at margin 0; beta * margin for a sigmoid loss."""
    accuracy: float
    """Share of pairs with a margin above 0; a margin of exactly 0 counts half."""
    chosen_change: float
    """d(chosen): the policy's error on the chosen video less the reference's."""
    rejected_change: float
    """d(rejected)."""
    gradient_factor: float
    """Half of the loss's slope on the margin relative to that at margin 0: 0.5 at the start, 0 once
    the loss is satisfied, below 0 where a loss with a target lowers the margin."""
    rejected_dominant: float
    """Share of pairs with d(chosen) > 0 and d(rejected) > d(chosen): the margin grows although the
    chosen video is predicted worse (Diffusion-SDPO)."""
    grad_norm: float
    """Gradient norm before clipping; not finite if a loss scaler skipped the step."""
    lr: float
    """Learning rate of the step."""
    pairs_per_second: float
    memory_gib: float
    """Peak memory so far, GiB."""
    seconds: float
    """Seconds of training so far, without the time between an interruption and resuming."""
    eta_seconds: float
    """Expected seconds to the end."""
    compares: bool = True
    """Whether the loss compares the two videos. If not, only the chosen video is predicted: margin,
    logits and the rejected change are 0, accuracy and gradient factor 0.5."""
    reference: bool = True
    """Whether there is a reference. If not, the changes of error are the policy's errors."""
    skipped: bool = False
    """Whether the weights stayed the same because the loss or the gradient was not finite."""

    def tracked(self) -> dict[str, float]:
        """The figures under TRL's names, for trackers.

        A reward is the negative change of error. Unlike TRL's it is not multiplied by beta. Figures
        that the loss does not have are left out.
        """
        figures = {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.lr,
            "errors/chosen": self.chosen_change,
            "pairs_per_second": self.pairs_per_second,
            "memory_gib": self.memory_gib,
            "skipped": float(self.skipped),
        }
        if self.compares:
            figures |= {
                "rewards/chosen": -self.chosen_change,
                "rewards/rejected": -self.rejected_change,
                "rewards/margins": self.margin,
                "rewards/accuracies": self.accuracy,
                "errors/rejected": self.rejected_change,
                "logits": self.logits,
                "gradient_factor": self.gradient_factor,
                "rejected_dominant": self.rejected_dominant,
            }
        return figures


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One optimizer step is done."""

    report: StepReport
    checkpoint: Path | None
    """The checkpoint written after the step; None if none was due."""
    nonfinite_pairs: Sequence[str] = ()
    """Keys of the pairs whose loss was not finite, or of all pairs if only the gradient was not.
    The step was skipped then."""
    ended: str = ""
    """Why a listener has ended the training after this step; "" if none has."""
