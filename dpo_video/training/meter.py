"""From the figures of a step's pairs to its report."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dpo_video.errors import TrainingError
from dpo_video.support.report import StepReport
from dpo_video.training.objective import PairFigures


class Meter:
    """Makes the reports of a run, and measures its time."""

    def __init__(
        self,
        accelerator: Accelerator,
        step: int,
        steps: int,
        before: float,
        *,
        compares: bool = True,
        reference: bool = True,
    ) -> None:
        """Start at `step` of `steps`, of which those so far took `before` seconds.

        `compares` and `reference` are those of the reports.
        """
        self._accelerator, self._first, self._steps = accelerator, step, steps
        self._compares, self._reference = compares, reference
        self._before = before
        self._run_start = self._step_start = time.monotonic()

    def start_step(self) -> None:
        """Start a step's time."""
        self._step_start = time.monotonic()

    def report(self, step: int, figures: PairFigures, grad_norm: float, lr: float) -> StepReport:
        """The figures of one step over the pairs of all processes; one host sync."""
        now = time.monotonic()
        seconds = now - self._run_start
        columns = torch.stack([value.float() for value in vars(figures).values()], dim=1)
        rows = self._accelerator.gather(columns).cpu()
        values = dict(zip(vars(figures), rows.unbind(dim=1), strict=True))
        margin, chosen = values["margin"], values["chosen_change"]
        worse = (chosen > 0) & (values["rejected_change"] > chosen.abs())
        return StepReport(
            step=step,
            **{name: value.mean().item() for name, value in values.items()},
            accuracy=((margin > 0).float() + 0.5 * (margin == 0).float()).mean().item(),
            rejected_dominant=worse.float().mean().item(),
            grad_norm=grad_norm,
            lr=lr,
            pairs_per_second=len(rows) / (now - self._step_start),
            memory_gib=_peak_memory(self._accelerator.device) / 2**30,
            seconds=self._before + seconds,
            eta_seconds=(self._steps - step) * seconds / (step - self._first),
            compares=self._compares,
            reference=self._reference,
        )


def nonfinite_pairs(
    figures: PairFigures, keys: Sequence[str], report: StepReport, accelerator: Accelerator
) -> list[str]:
    """Keys of the pairs whose loss is not finite, or of all if only the gradient is not.

    Those of all processes, sorted.
    """
    if math.isfinite(report.loss):
        found = list(keys)
    else:
        found = [key for key, loss in zip(keys, figures.loss, strict=True) if not loss.isfinite()]
    if accelerator.num_processes > 1:
        found = gather_object(found)
    return sorted(set(found))


def check_first_step(figures: PairFigures) -> None:
    """Raise a TrainingError unless the policy equals its reference to the bit."""
    margin = figures.margin.abs().max().item()
    if margin != 0 and not (figures.chosen_change.any() or figures.rejected_change.any()):
        raise TrainingError(
            f"At step 0 the policy equals the reference, but the loss gives a margin of "
            f"{margin:.3g} instead of 0. Correct the margin in the loss's LossOutput."
        )
    if margin != 0:
        raise TrainingError(
            f"At step 0 the policy must equal the reference, but the margin is {margin:.3g}. The "
            "two do not run alike: check for dropout, another precision or other kernels in the "
            "backbone, or an adapter that does not start at zero. If blocks are compiled, set "
            "memory.compile=off."
        )


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
