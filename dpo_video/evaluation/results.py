"""What an evaluation found: everything that the table and the page show, and that JSON keeps."""

from __future__ import annotations

from typing import Self

from pydantic import Field, ValidationError, model_validator
from rich import box
from rich.table import Table
from rich.text import Text

from dpo_video.errors import UserError, first_fault
from dpo_video.evaluation.verdict import EvaluationVerdict, MetricResult
from dpo_video.support.formatting import brief, percent
from dpo_video.support.statistics import Record
from dpo_video.training.diagnosis import StepReport, TrainingVerdict


class Evaluation(Record):
    """Base against tuned on identical prompts and seeds. The videos themselves are kept apart."""

    name: str
    """The run's, as the page's title."""
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    """One a prompt."""
    frames: int = Field(ge=1)
    """Of every video."""
    fps: float = Field(gt=0)
    metrics: tuple[MetricResult, ...]
    tolerance: float
    """Largest relative fall of the motion that counts as keeping it."""
    verdict: EvaluationVerdict
    training: tuple[StepReport, ...] = ()
    training_verdict: TrainingVerdict | None = None
    command: str
    """What repeats this evaluation."""
    run_toml: str
    """The run's settings, fully resolved."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Package to version."""
    facts: dict[str, str] = Field(default_factory=dict)
    """Anything else worth a line: name to text."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        videos = len(self.prompts)
        lengths = [len(self.seeds)]
        lengths += [
            len(values) for metric in self.metrics for values in (metric.base, metric.tuned)
        ]
        if any(length != videos for length in lengths):
            raise ValueError(f"{videos} prompts, but {sorted(set(lengths))} seeds and values")
        return self

    def to_json(self) -> str:
        """The evaluation as JSON; `from_json` gives an equal one back."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read what `to_json` wrote.

        Raises:
            UserError: it is not an evaluation, or one of another version.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(
                f"This is not an evaluation that this version can read ({first_fault(error)}). "
                "Run dpo-video evaluate again to write a new one."
            ) from error


def mark(metric: MetricResult) -> tuple[str, str]:
    """A sign and a word for what happened to a metric; never a colour alone."""
    if metric.improved:
        return "\N{BLACK UP-POINTING TRIANGLE}", "better"
    if metric.worsened:
        return "\N{BLACK DOWN-POINTING TRIANGLE}", "worse"
    return "\N{WHITE CIRCLE}", "no clear change"


def evaluation_table(evaluation: Evaluation) -> Table:
    """The metrics as a table for the terminal, under the verdict."""
    table = Table(
        title=Text(evaluation.verdict.headline, style="bold"),
        caption=f"{len(evaluation.prompts)} videos of each, same prompts and seeds; intervals are "
        "95% bootstrap intervals of the paired difference",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # 80 columns must do
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    for header in ("metric", "wanted", "base", "tuned", "change", "95% interval"):
        table.add_column(
            header, justify="left" if header in ("metric", "wanted") else "right", no_wrap=True
        )
    table.add_column("", no_wrap=True)
    styles = {"better": "green", "worse": "red", "no clear change": "dim"}
    for metric in evaluation.metrics:
        change = metric.difference
        sign, word = mark(metric)
        relative = change.relative is not None
        table.add_row(
            Text(metric.label),
            "higher" if metric.higher_is_better else "lower",
            brief(change.base_mean),
            brief(change.tuned_mean),
            percent(change.relative) if relative else brief(change.difference),
            f"{percent(change.relative_low)} to {percent(change.relative_high)}"
            if relative
            else f"{brief(change.low)} to {brief(change.high)}",
            Text(f"{sign} {word}".replace("no clear change", "unclear"), style=styles[word]),
        )
    return table
