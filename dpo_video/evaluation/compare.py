"""Compare several recipes on equal terms, pooled over training seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from rich import box
from rich.table import Table

from dpo_video.errors import unknown
from dpo_video.evaluation import charts
from dpo_video.evaluation.rendering import asset, templates
from dpo_video.evaluation.results import Evaluation
from dpo_video.evaluation.verdict import EvaluationVerdict, MetricResult, Role, judge_evaluation
from dpo_video.support.atomic import write_text
from dpo_video.support.formatting import MINUS, html_table, percent
from dpo_video.support.statistics import PairedDifference, Record


class Cell(Record):
    """One recipe trained with one seed."""

    recipe: str
    seed: int
    steps: int
    seconds: float
    """Training time."""
    training: str
    """The training's state in a word: healthy, saturated, ..."""
    metrics: tuple[MetricResult, ...]
    prompts: tuple[str, ...]
    """The prompt of each video."""
    min_prompts: int

    @classmethod
    def of(cls, recipe: str, seed: int, evaluation: Evaluation) -> Cell:
        """The cell of an evaluation."""
        verdict, reports = evaluation.training_verdict, evaluation.training
        return cls(
            recipe=recipe,
            seed=seed,
            steps=reports[-1].step if reports else 0,
            seconds=reports[-1].seconds if reports else 0.0,
            training=verdict.state.value if verdict else "unknown",
            metrics=evaluation.metrics,
            prompts=evaluation.prompts,
            min_prompts=evaluation.min_prompts,
        )


class Row(Record):
    """One recipe over its training seeds."""

    recipe: str
    seeds: tuple[int, ...]
    steps: int
    seconds: float
    """Training time, the mean over the seeds."""
    training: tuple[str, ...]
    """State of the training with each seed."""
    metrics: tuple[MetricResult, ...]
    """The tuned value of a video is its mean over the seeds; intervals cover prompts and seeds."""
    by_seed: dict[str, tuple[float | None, ...]]
    """Metric to its relative change with each seed."""
    verdict: EvaluationVerdict


class Comparison(Record):
    """All rows, in the order of the recipes."""

    rows: tuple[Row, ...]
    prompts: int = Field(ge=2)
    machine: str
    """The machine that it was measured on."""
    versions: dict[str, str]

    @classmethod
    def of(cls, cells: Sequence[Cell], *, machine: str, versions: dict[str, str]) -> Comparison:
        """Pool the cells by recipe; the cells of a recipe must be neighbours.

        A metric that is missing in one cell is left out of all.

        Raises:
            ValueError: if there are no cells, or those of a recipe have other base videos.
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

    def __getitem__(self, recipe: str) -> Row:
        """The row of a recipe.

        Raises:
            UserError: if there is none of that name.
        """
        rows = {row.recipe: row for row in self.rows}
        if recipe not in rows:
            raise unknown("recipe", recipe, list(rows))
        return rows[recipe]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-ready data."""
        return self.model_dump(mode="json")

    def table(self) -> Table:
        """The relative change of every metric as a table for the terminal."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.caption, table.caption_justify = self._caption, "left"
        table.add_column("recipe", no_wrap=True)
        table.add_column("seeds", justify="right")
        for metric in self.rows[0].metrics:
            table.add_column(metric.label, justify="right")
        table.add_column("verdict")
        for row in self.rows:
            cells = []
            for metric in row.metrics:
                sign, word = metric.mark
                style = {"better": "green", "worse": "red"}.get(word, "dim")
                cells.append(f"[{style}]{percent(metric.difference.relative)} {sign}[/]")
            table.add_row(row.recipe, str(len(row.seeds)), *cells, row.verdict.headline)
        return table

    def markdown(self) -> str:
        """The table with intervals in Markdown."""
        header, rows = self._cells()
        base = [metric.difference.base_mean for metric in self.rows[0].metrics]
        lines = [header, ["---"] * len(header)]
        lines.append(["*base*", "", "", *(f"*{value:.3g}*" for value in base), ""])
        return "".join(f"| {' | '.join(cells)} |\n" for cells in [*lines, *rows])

    @property
    def drawable(self) -> bool:
        """Whether there are a target and a motion metric to draw."""
        return {Role.TARGET, Role.MOTION} <= {metric.role for metric in self.rows[0].metrics}

    def picture(self, *, inline: bool = False) -> str:
        """An SVG: the change of the first target against the change of the motion.

        A hollow mark means that a guard got worse: the gain came at a loss of fidelity.

        Args:
            inline: Whether it is part of a page that has its style.

        Raises:
            ValueError: if it is not `drawable`.
        """
        if not self.drawable:
            raise ValueError("the picture needs a target and a motion metric")
        metrics = self.rows[0].metrics
        index = {metric.role: i for i, metric in reversed(list(enumerate(metrics)))}
        labels = {role: f"change of {metrics[i].label}" for role, i in index.items()}

        def axis(role: Role) -> Any:
            return lambda values, start, end: charts.linear(
                values, start, end, ticks=8, text=_tick, label=labels[role]
            )

        points = [
            charts.Point(
                name=row.recipe,
                x=_spread(row.metrics[index[Role.MOTION]].difference),
                y=_spread(row.metrics[index[Role.TARGET]].difference),
                hollow=any(m.lost for m in row.metrics if m.role is Role.GUARD),
            )
            for row in self.rows
        ]
        panel = charts.Panel(
            points=points, x=axis(Role.MOTION), y=axis(Role.TARGET), origin="base model"
        )
        title = f"{labels[Role.TARGET]} against {labels[Role.MOTION]}, one mark per recipe"
        return charts.scatter(title, [panel], width=480, inline=inline)

    def page(self, path: Path | str) -> Path:
        """Write a self-contained page: the picture, the table and the verdicts."""
        header, rows = self._cells()
        text = (
            templates()
            .get_template("comparison.html.j2")
            .render(
                comparison=self,
                caption=self._caption,
                style=asset("evaluation.css"),
                picture=self.picture(inline=True) if self.drawable else "",
                header=header,
                rows=rows,
            )
        )
        path = Path(path)
        write_text(path, text)
        return path

    def _repr_html_(self) -> str:
        return html_table(*self._cells(), caption=self._caption)

    @property
    def _caption(self) -> str:
        return (
            f"{self.prompts} videos per recipe, same prompts and noise as the base model; changes "
            "are means over the training seeds"
        )

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        labels = [metric.label for metric in self.rows[0].metrics]
        rows = []
        for row in self.rows:
            changes = [
                f"{percent(metric.difference.relative)} ({metric.interval_text})"
                for metric in row.metrics
            ]
            seeds = str(len(row.seeds))
            rows.append([row.recipe, seeds, str(row.steps), *changes, row.verdict.headline])
        return ["recipe", "seeds", "steps", *labels, "verdict"], rows


def _on_common_metrics(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with the metrics that all of them have, in the order of the first."""
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
            raise ValueError(f"the seeds of '{cells[0].recipe}' have other base videos")
        pooled.append(
            MetricResult.measured(
                first.name,
                first.base,
                *(result.tuned for result in results),
                unit=first.unit,
                higher_is_better=first.higher_is_better,
                role=first.role,
                prompts=cells[0].prompts,
                min_effect=first.min_effect,
                tolerance=first.tolerance,
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
        verdict=judge_evaluation(pooled, min_prompts=cells[0].min_prompts),
    )


def _spread(change: PairedDifference) -> charts.Spread:
    return charts.Spread(
        change.relative or 0.0, change.relative_low or 0.0, change.relative_high or 0.0
    )


def _tick(change: float) -> str:
    return f"{100 * change:+g}%".replace("-", MINUS) if change else "0"
