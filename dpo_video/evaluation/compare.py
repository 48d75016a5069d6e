"""Several recipes on equal terms: what a comparison found, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from pydantic import Field
from rich import box
from rich.table import Table

from dpo_video.evaluation.report import templates
from dpo_video.evaluation.results import Evaluation, mark
from dpo_video.evaluation.verdict import EvaluationVerdict, MetricResult, Role, judge_evaluation
from dpo_video.support.formatting import percent
from dpo_video.support.statistics import Record


class Cell(Record):
    """One recipe, trained with one seed."""

    recipe: str
    seed: int
    steps: int
    seconds: float
    """Of training."""
    training: str
    """The training's state in a word: healthy, saturated, ..."""
    metrics: tuple[MetricResult, ...]
    tolerance: float

    @classmethod
    def of(cls, recipe: str, seed: int, evaluation: Evaluation) -> Cell:
        """What an evaluation says of a recipe."""
        verdict, reports = evaluation.training_verdict, evaluation.training
        return cls(
            recipe=recipe,
            seed=seed,
            steps=reports[-1].step if reports else 0,
            seconds=reports[-1].seconds if reports else 0.0,
            training=verdict.state.value if verdict else "unknown",
            metrics=evaluation.metrics,
            tolerance=evaluation.tolerance,
        )


class Row(Record):
    """One recipe over its training seeds."""

    recipe: str
    seeds: tuple[int, ...]
    steps: int
    seconds: float
    """Of training, the mean over the seeds."""
    training: tuple[str, ...]
    """The state of each seed's training."""
    metrics: tuple[MetricResult, ...]
    """The tuned value of a video is its mean over the seeds; the interval is over the videos."""
    by_seed: dict[str, tuple[float | None, ...]]
    """Metric to the relative change with each seed: how much the seed matters."""
    verdict: EvaluationVerdict


class Comparison(Record):
    """All rows, in the order in which the recipes were named."""

    rows: tuple[Row, ...]
    prompts: int = Field(ge=2)
    machine: str
    """What it was measured on."""
    versions: dict[str, str]

    @classmethod
    def of(cls, cells: Sequence[Cell], *, machine: str, versions: dict[str, str]) -> Comparison:
        """Pool the cells by recipe; cells of a recipe must be neighbours.

        A metric that was left out of one evaluation is left out of all.

        Raises:
            ValueError: there are no cells, or those of a recipe disagree on the base's videos.
        """
        if not cells:
            raise ValueError("there is nothing to compare")
        cells = _on_common_metrics(cells)
        groups = [list(group) for _, group in groupby(cells, key=lambda cell: cell.recipe)]
        return cls(
            rows=tuple(_row(group) for group in groups),
            prompts=len(cells[0].metrics[0].base),
            machine=machine,
            versions=versions,
        )


def _on_common_metrics(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with those metrics alone that all of them have, in the order of the first."""
    measured = [{metric.name: metric for metric in cell.metrics} for cell in cells]
    names = [name for name in measured[0] if all(name in each for each in measured)]
    return [
        cell.model_copy(update={"metrics": tuple(each[name] for name in names)})
        for cell, each in zip(cells, measured, strict=True)
    ]


def _row(cells: Sequence[Cell]) -> Row:
    pooled = []
    for results in zip(*(cell.metrics for cell in cells), strict=True):
        first = results[0]
        if any(result.base != first.base for result in results):
            raise ValueError(f"the seeds of '{cells[0].recipe}' were compared with other videos")
        pooled.append(
            MetricResult.measured(
                first.name,
                first.base,
                np.mean([result.tuned for result in results], axis=0).tolist(),
                unit=first.unit,
                higher_is_better=first.higher_is_better,
                role=first.role,
            )
        )
    return Row(
        recipe=cells[0].recipe,
        seeds=tuple(cell.seed for cell in cells),
        steps=cells[0].steps,
        seconds=float(np.mean([cell.seconds for cell in cells])),
        training=tuple(cell.training for cell in cells),
        metrics=tuple(pooled),
        by_seed={
            metric.name: tuple(cell.metrics[i].difference.relative for cell in cells)
            for i, metric in enumerate(pooled)
        },
        verdict=judge_evaluation(pooled, tolerance=cells[0].tolerance),
    )


def _change(row: Row, index: int) -> str:
    metric = row.metrics[index]
    change = metric.difference
    text = f"{percent(change.relative)} ({percent(change.relative_low)} to "
    return text + f"{percent(change.relative_high)})"


def comparison_table(comparison: Comparison) -> Table:
    """For the terminal: the relative change of every metric, marked where it is clear."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=f"{comparison.prompts} videos each, same prompts and noise as the base; change of "
        "the mean over the training seeds",
        caption_justify="left",
    )
    table.add_column("recipe", no_wrap=True)
    table.add_column("seeds", justify="right")
    for metric in comparison.rows[0].metrics:
        table.add_column(metric.label, justify="right")
    table.add_column("verdict")
    for row in comparison.rows:
        cells = []
        for metric in row.metrics:
            sign, word = mark(metric)
            style = {"better": "green", "worse": "red"}.get(word, "dim")
            cells.append(f"[{style}]{percent(metric.difference.relative)} {sign}[/]")
        table.add_row(row.recipe, str(len(row.seeds)), *cells, row.verdict.headline)
    return table


def comparison_markdown(comparison: Comparison) -> str:
    """The same with intervals, for a README."""
    base = comparison.rows[0].metrics
    header = ["recipe", "seeds", "steps", *(metric.label for metric in base), "verdict"]
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        "| *base* | | | "
        + " | ".join(f"*{metric.difference.base_mean:.3g}*" for metric in base)
        + " | |",
    ]
    for row in comparison.rows:
        changes = [_change(row, i) for i in range(len(row.metrics))]
        cells = [row.recipe, str(len(row.seeds)), str(row.steps), *changes, row.verdict.headline]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


WIDTH, HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 24, 48
_LETTER, _LINE = 7, 14  # pixels that a letter is wide, and a line high


class _Scale:
    """Data to pixels along one axis, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        low, high = min(0.0, *values), max(0.0, *values)
        margin = 0.08 * (high - low or 1.0)
        self.low, self.high, self.start, self.stop = low - margin, high + margin, start, stop

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self) -> list[float]:
        span = self.high - self.low
        step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if span / s <= 8)
        return [n * step for n in range(-1000, 1001) if self.low <= n * step <= self.high]


def frontier(comparison: Comparison) -> str:
    """An SVG: the change of the first target against the change of the motion, with intervals.

    A ring instead of a dot means that a guard got clearly worse: the gain was paid for in fidelity.

    Raises:
        ValueError: no metric of the comparison is a target, or none measures motion.
    """
    roles = {metric.role: i for i, metric in reversed(list(enumerate(comparison.rows[0].metrics)))}
    if not {Role.TARGET, Role.MOTION} <= roles.keys():
        raise ValueError("the picture needs a target and a motion metric")
    points = []
    for row in comparison.rows:
        x, y = (row.metrics[roles[role]].difference for role in (Role.MOTION, Role.TARGET))
        guards = [metric for metric in row.metrics if metric.role is Role.GUARD]
        points.append((row.recipe, x, y, any(metric.worsened for metric in guards)))
    xs = [v or 0.0 for _, x, _, _ in points for v in (x.relative_low, x.relative_high)]
    ys = [v or 0.0 for _, _, y, _ in points for v in (y.relative_low, y.relative_high)]
    across, down = _Scale(xs, _LEFT, WIDTH - _RIGHT), _Scale(ys, HEIGHT - _BOTTOM, _TOP)
    labels = _lines(
        [(across(x.relative or 0.0), down(y.relative or 0.0), name) for name, x, y, _ in points]
    )
    first = comparison.rows[0].metrics
    return (
        templates()
        .get_template("frontier.svg.j2")
        .render(
            width=WIDTH,
            height=HEIGHT,
            frame={"left": _LEFT, "right": WIDTH - _RIGHT, "top": _TOP, "bottom": HEIGHT - _BOTTOM},
            x_label=f"change of {first[roles[Role.MOTION]].label}",
            y_label=f"change of {first[roles[Role.TARGET]].label}",
            x_ticks=[(across(t), f"{t:+.0%}" if t else "0") for t in across.ticks()],
            y_ticks=[(down(t), f"{t:+.0%}" if t else "0") for t in down.ticks()],
            zero={"x": across(0), "y": down(0)},
            points=[
                {
                    "name": name,
                    "x": across(x.relative or 0.0),
                    "y": down(y.relative or 0.0),
                    "left": across(x.relative_low or 0.0),
                    "right": across(x.relative_high or 0.0),
                    "top": down(y.relative_high or 0.0),
                    "bottom": down(y.relative_low or 0.0),
                    "worse": worse,
                    "label": label,
                }
                for (name, x, y, worse), label in zip(points, labels, strict=True)
            ],
        )
    )


def _lines(marks: Sequence[tuple[float, float, str]]) -> list[float]:
    """Where the name of each mark stands, `(x, y, name)`: at its height, or below other names."""
    lines: dict[int, float] = {}
    for i in sorted(range(len(marks)), key=lambda i: marks[i][1]):
        left, line, name = marks[i]
        right = left + _LETTER * len(name)
        beside = [
            lines[j]
            for j in lines
            if marks[j][0] < right and left < marks[j][0] + _LETTER * len(marks[j][2])
        ]
        for taken in sorted(beside):
            if abs(taken - line) < _LINE:
                line = taken + _LINE
        lines[i] = line
    return [lines[i] for i in range(len(marks))]
