"""Entries: one with one training seed, one over its seeds, and the choice of one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, groupby
from typing import Any, Self

import numpy as np
from pydantic import Field

from dpo_video.evaluation.change import Witness, compared
from dpo_video.evaluation.results import Evaluation
from dpo_video.evaluation.verdict import EvaluationVerdict, MetricResult, Role, judge_evaluation
from dpo_video.settings import EvaluateSettings
from dpo_video.support.formatting import percent
from dpo_video.support.statistics import Record


class Cell(Record):
    """One entry trained with one seed."""

    entry: str
    seed: int
    steps: int
    seconds: float
    """Training time."""
    training: str
    """The training's state in a word: healthy, saturated, ..."""
    metrics: tuple[MetricResult, ...]
    prompts: tuple[str, ...]
    """The prompt of each video."""
    trained_prompts: tuple[str, ...] = ()
    """Those of the prompts that are also prompts of the training pairs."""
    min_prompts: int

    @classmethod
    def of(cls, entry: str, seed: int, evaluation: Evaluation, settings: EvaluateSettings) -> Cell:
        """The cell of an evaluation, judged by the thresholds of `settings`."""
        verdict, reports = evaluation.training_verdict, evaluation.training
        return cls(
            entry=entry,
            seed=seed,
            steps=reports[-1].step if reports else 0,
            seconds=reports[-1].seconds if reports else 0.0,
            training=verdict.state.value if verdict else "unknown",
            metrics=tuple(
                metric.model_copy(
                    update={
                        "min_effect": settings.min_effects.get(metric.name, settings.min_effect),
                        "tolerance": settings.tolerance,
                    }
                )
                for metric in evaluation.metrics
            ),
            prompts=evaluation.prompts,
            trained_prompts=evaluation.trained_prompts,
            min_prompts=settings.min_prompts,
        )


class Row(Record):
    """One entry over its training seeds."""

    entry: str
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

    @property
    def target(self) -> MetricResult:
        """The first target."""
        return next(metric for metric in self.metrics if metric.role is Role.TARGET)

    @property
    def safe(self) -> bool:
        """Whether neither motion nor a guard is lost."""
        return not any(metric.lost for metric in self.metrics if metric.role is not Role.TARGET)


class Selection(Record):
    """The choice of an entry on prompts and training seeds that play no part in the report."""

    prompts: int = Field(ge=0)
    """Number of prompts that choose, the first ones; 0 for all."""
    seeds: tuple[int, ...]
    """Training seeds that choose; none for all."""
    rows: tuple[Row, ...]
    """The entries on these prompts and seeds."""
    chosen: str
    """The entry with the largest improvement of the first target, among those that lost neither
    motion nor a guard if there is one."""

    @classmethod
    def of(cls, cells: Sequence[Cell], prompts: int, seeds: Sequence[int]) -> Self:
        """Choose an entry by its cells.

        Raises:
            ValueError: if no cell has one of the seeds.
        """
        choosing = [_part(cell, prompts, True) for cell in cells if not seeds or cell.seed in seeds]
        rows = pool(choosing)
        safe = [row for row in rows if row.safe]
        best = max(safe or rows, key=lambda row: _gain(row.target))
        return cls(prompts=prompts, seeds=tuple(seeds), rows=rows, chosen=best.entry)

    def reported(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells without the seeds and prompts that chose."""
        rest = [cell for cell in cells if cell.seed not in self.seeds]
        return [_part(cell, self.prompts, False) for cell in rest] if self.prompts else rest

    @property
    def where(self) -> str:
        """The prompts and seeds that chose, in words."""
        parts = [f"the first {self.prompts} prompts"] if self.prompts else []
        if self.seeds:
            plural = "s" if len(self.seeds) > 1 else ""
            parts.append(f"training seed{plural} {', '.join(map(str, self.seeds))}")
        return " with ".join(parts)


def on_common_metrics(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with the metrics that all of them have, in the order of the first."""
    measured = [{metric.name: metric for metric in cell.metrics} for cell in cells]
    names = [name for name in measured[0] if all(name in each for each in measured)]
    return [
        cell.model_copy(update={"metrics": tuple(each[name] for name in names)})
        for cell, each in zip(cells, measured, strict=True)
    ]


def _part(cell: Cell, count: int, first: bool) -> Cell:
    """The cell on its first `count` different prompts, or on the others."""
    names = set(list(dict.fromkeys(cell.prompts))[:count])
    keep = [not count or (prompt in names) == first for prompt in cell.prompts]

    def kept(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(compress(values, keep))

    prompts = kept(cell.prompts)
    metrics = []
    for metric in cell.metrics:
        update: dict[str, Any] = {
            **compared(kept(metric.base), kept(metric.tuned), prompts=prompts)
        }
        if (second := metric.witness) is not None:
            update["witness"] = Witness.measured(
                second.name, kept(second.base), kept(second.tuned), prompts=prompts
            )
        metrics.append(metric.model_copy(update=update))
    return cell.model_copy(update={"prompts": prompts, "metrics": tuple(metrics)})


def pool(cells: Sequence[Cell]) -> tuple[Row, ...]:
    """One row per entry; the cells of an entry must be neighbours.

    Raises:
        ValueError: if there are no cells, or those of an entry have other base videos.
    """
    if not cells:
        raise ValueError("no training seed is left to choose by, or to report")
    return tuple(_row(list(group)) for _, group in groupby(cells, key=lambda cell: cell.entry))


def _row(cells: Sequence[Cell]) -> Row:
    pooled = []
    for results in zip(*(cell.metrics for cell in cells), strict=True):
        first = results[0]
        if any(result.base != first.base for result in results):
            raise ValueError(f"the seeds of '{cells[0].entry}' have other base videos")
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
                witness=_witness(results, cells[0].prompts),
            )
        )
    by_seed = {
        metric.name: tuple(cell.metrics[i].difference.relative for cell in cells)
        for i, metric in enumerate(pooled)
    }
    trained = set(cells[0].prompts) & {name for cell in cells for name in cell.trained_prompts}
    verdict = judge_evaluation(pooled, min_prompts=cells[0].min_prompts, trained_on=len(trained))
    seeds = [
        f"{metric.label.capitalize()} by training seed: {', '.join(map(percent, changes))}."
        for metric, changes in zip(pooled, by_seed.values(), strict=True)
        if len(cells) > 1 and metric.role is Role.TARGET
    ]
    again = [
        f"{metric.label.capitalize()} {metric.witness.text}."
        for metric in pooled
        if metric.witness is not None
    ]
    return Row(
        entry=cells[0].entry,
        seeds=tuple(cell.seed for cell in cells),
        steps=cells[0].steps,
        seconds=float(np.mean([cell.seconds for cell in cells])),
        training=tuple(cell.training for cell in cells),
        metrics=tuple(pooled),
        by_seed=by_seed,
        verdict=verdict.model_copy(update={"details": (*verdict.details, *again, *seeds)}),
    )


def _witness(results: Sequence[MetricResult], prompts: Sequence[str]) -> Witness | None:
    """The second measurement over all runs; None if one of them lacks it."""
    found = [result.witness for result in results if result.witness is not None]
    if len(found) < len(results) or any(
        (each.name, each.base) != (found[0].name, found[0].base) for each in found
    ):
        return None
    return Witness.measured(
        found[0].name, found[0].base, *(each.tuned for each in found), prompts=prompts
    )


def _gain(metric: MetricResult) -> float:
    """The change for the better, relative to the base if possible."""
    change = metric.difference
    size = change.difference if change.relative is None else change.relative
    return size if metric.higher_is_better else -size
