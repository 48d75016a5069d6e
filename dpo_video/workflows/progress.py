"""Progress of a workflow, as calls: the one way in which a workflow reports while it runs."""

from __future__ import annotations

from dpo_video.support.report import StepEvent
from dpo_video.training.diagnosis import TrainingVerdict


class Progress:
    """Receives a workflow's progress. This one ignores it; override the methods you need."""

    def note(self, text: str, *, warning: bool = False) -> None:
        """A sentence about what is being done, or a warning; plain text."""

    def update(self, task: str, done: int, total: int | None = None) -> None:
        """`done` of `total` items of a task ("pairs", "videos") are finished.

        `total` is None where it is unknown.
        """

    def step(self, event: StepEvent, verdict: TrainingVerdict, steps: int) -> None:
        """One of `steps` optimizer steps is done; `verdict` judges the run up to it."""


SILENT = Progress()
