"""Measurements as pictures: candidates of a group, and memory modes among the memories of cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.support.results import Group
from dpo_video.evaluation import charts
from dpo_video.evaluation.charts import Point, Spread


def scatter(group: Group) -> str | None:
    """An SVG: the first numeric figure against the time relative to the baseline.

    Time is on a logarithmic axis; both are better towards the lower left. None if there is no such
    figure, or the baseline did not run.
    """
    numbers = (
        figure for each in group.candidates for figure, value in each.figures.items()
        if isinstance(value, float | int)
    )  # fmt: skip
    figure = next(numbers, None)
    if figure is None:
        return None
    points = [
        Point(
            name=each.name,
            x=Spread.exact(relative),
            y=Spread.exact(float(each.figures[figure])),
            hollow=each.name == group.baseline,
        )
        for each in group.candidates
        if figure in each.figures and (relative := group.relative(each.name)) is not None
    ]
    if len(points) < 2:
        return None

    def time(values: Sequence[float], start: float, end: float) -> charts.Axis:
        label = f"time relative to {group.baseline}"
        return charts.log2(values, start, end, text=lambda value: f"{value:.2g}", label=label)

    def size(values: Sequence[float], start: float, end: float) -> charts.Axis:
        values = [0.0, 1.1 * max(values)]
        return charts.linear(values, start, end, air=0.0, ticks=6, label=figure)

    return charts.scatter(group.name, [charts.Panel(points=points, x=time, y=size)])


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A memory mode."""

    name: str
    cost: float
    """Operations or seconds per pair."""
    gib: float
    """Peak memory."""
    hollow: bool = False
    """Whether it changes the numbers."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The modes of one model."""

    name: str
    cost: str
    """Label of the axis of `Spot.cost`."""
    spots: Sequence[Spot]


def peaks(title: str, panels: Sequence[Panel], cards: Mapping[str, float]) -> str:
    """An SVG: peak memory against the cost per pair, one panel per model, with lines for cards.

    Memory is on a logarithmic axis; both are better towards the lower left.

    Args:
        title: Title of the picture.
        panels: From the top down.
        cards: Name to GiB. Cards of nearly the same size share a line.
    """
    memory = partial(charts.log2, steps=(1, 2, 4), text="{:g}".format, label="peak, GiB")
    drawn = [
        charts.Panel(
            title=panel.name,
            points=[
                Point(
                    name=spot.name,
                    x=Spread.exact(spot.cost),
                    y=Spread.exact(spot.gib),
                    hollow=spot.hollow,
                )
                for spot in panel.spots
            ],
            x=partial(charts.linear, ticks=6, text="{:g}".format, label=panel.cost),
            y=memory,
            limits=_shared(cards),
        )
        for panel in panels
    ]
    # The height has room for the names of two dozen modes.
    return charts.scatter(title, drawn, width=528, height=430)


def _shared(cards: Mapping[str, float]) -> dict[str, float]:
    """Cards within a tenth of one another share one line, that of the smallest."""
    lines: list[tuple[list[str], float]] = []
    for name, gib in sorted(cards.items(), key=lambda card: card[1]):
        if lines and gib < 1.1 * lines[-1][1]:
            lines[-1][0].append(name)
        else:
            lines.append(([name], gib))
    return {f"{', '.join(names)}: {gib:.0f} GiB": gib for names, gib in lines}
