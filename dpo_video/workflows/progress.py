"""Progress of a workflow, as calls: the one way in which a workflow reports while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo_video.training.diagnosis import TrainingVerdict
from dpo_video.training.report import StepReport


class Progress:
    """Receives a workflow's progress. This one ignores it; override the methods you need."""

    def note(self, text: str, *, warning: bool = False) -> None:
        """A sentence about what is being done, or a warning; plain text."""

    def update(self, task: str, done: int, total: int | None = None) -> None:
        """`done` of `total` items of a task ("pairs", "videos") are finished.

        `total` is None where it is unknown.
        """

    def step(
        self,
        report: StepReport,
        verdict: TrainingVerdict,
        *,
        steps: int,
        checkpoint: Path | None,
        not_finite: Sequence[str],
    ) -> None:
        """One optimizer step is done.

        Args:
            report: The step's figures.
            verdict: The judgement of the run up to this step.
            steps: Optimizer steps of the run.
            checkpoint: The checkpoint written after the step, if one was.
            not_finite: Keys of the pairs whose loss was not finite; the step was skipped.
        """


SILENT = Progress()
