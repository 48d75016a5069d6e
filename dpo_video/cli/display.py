"""Progress and tables of the commands; imported when a command runs."""

from __future__ import annotations

from types import TracebackType
from typing import Self, final

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dpo_video.cli.console import WARNING, console, say
from dpo_video.support.report import StepEvent, StepReport
from dpo_video.training.diagnosis import TrainingState, TrainingVerdict
from dpo_video.workflows import progress as workflows

_LASTING = 5
"""Steps that a new state of the training lasts before it is printed."""
STYLES = {"healthy": "bold green", "too_early": "dim", "diverged": "bold red"}


def verdict_text(verdict: TrainingVerdict) -> Text:
    """A training's verdict in one line."""
    head = f"{verdict.state.value.replace('_', ' ')} (step {verdict.step})"
    style = STYLES.get(verdict.state.value, "bold yellow")
    return Text.assemble((head, style), f": {verdict.seen} {verdict.change}")


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        """The rate, once it is known."""
        return Text(f"{task.speed:.2f}/s" if task.speed else "", style="progress.data.speed")


@final
class TerminalProgress(workflows.Progress):
    """Shows a workflow's progress on stderr, with a bar while a task runs."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._live = Live(self._bars, console=console, refresh_per_second=4, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._state = self._seen = TrainingState.TOO_EARLY
        self._step = self._lasted = 0
        self._shown: TrainingVerdict | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def note(self, text: str, *, warning: bool = False) -> None:
        """A line; warnings in yellow."""
        say((text, WARNING) if warning else text)

    def update(self, task: str, done: int, total: int | None = None) -> None:
        """A bar for each task, until it is finished."""
        if not self._live.is_started:
            self._live.start()
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total, completed=done)
        unfinished = total is None or done < total
        self._bars.update(self._tasks[task], completed=done, total=total, visible=unfinished)

    def step(self, event: StepEvent, verdict: TrainingVerdict, steps: int) -> None:
        """The step's figures above the bar; a line for checkpoints, skips and new verdicts."""
        report = event.report
        self.update("steps", report.step, steps)
        self._live.update(Group(_table(_figures(report)), self._bars))
        if report.skipped:
            self.note(
                f"Skipped step {report.step}: its loss is {report.loss:.4g} and its gradient norm "
                f"{report.grad_norm:.4g}; pairs {', '.join(event.nonfinite_pairs)}. train.skips is "
                "the largest number of such steps in a run.",
                warning=True,
            )
        if event.checkpoint is not None:
            figures = _figures(report)
            shown = ("loss", "margin", "accuracy") if report.compares else ("loss",)
            text = "".join(f"  {name} {figures[name]}" for name in shown)
            self.note(f"step {report.step:>5}{text}  saved {event.checkpoint}")
        self._judge(report.step, verdict)

    def _judge(self, step: int, verdict: TrainingVerdict) -> None:
        """A line for a new state, once it has lasted, so that two states do not take turns."""
        if step <= self._step:  # of another run
            self._state = self._seen = TrainingState.TOO_EARLY
        self._lasted = self._lasted + 1 if verdict.state is self._seen else 1
        self._step, self._seen = step, verdict.state
        at_once = self._state is TrainingState.TOO_EARLY or self._seen is TrainingState.DIVERGED
        if self._seen is not self._state and (at_once or self._lasted >= _LASTING):
            say(verdict_text(verdict))
            self._state, self._shown = self._seen, verdict

    def showed(self, verdict: TrainingVerdict) -> bool:
        """Whether this verdict is the last one that was printed."""
        return verdict == self._shown


def _figures(report: StepReport) -> dict[str, str]:
    """The figures that the loss has, by name."""
    pair = {
        "margin": f"{report.margin:+.2e}",
        "accuracy": f"{report.accuracy:.0%}",
        "rejected error": f"{report.rejected_change:+.2e}",
        "gradient factor": f"{report.gradient_factor:.3f}",
    }
    return {
        "loss": f"{report.loss:.4f}",
        "chosen error": f"{report.chosen_change:+.2e}",
        **(pair if report.compares else {}),
        "pairs/s": f"{report.pairs_per_second:.2f}",
        "GiB": f"{report.memory_gib:.2f}",
    }


def _table(figures: dict[str, str]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in figures:
        table.add_column(name, justify="right", min_width=8)
    table.add_row(*figures.values())
    return table
