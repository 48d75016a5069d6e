"""Measurements as pictures: candidates of a group, and memory modes among the cards there are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.support.results import Group
from dpo_video.evaluation.report import templates

WIDTH, HEIGHT = 760, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 420, 24, 352  # of the frame; the names stand to its right
_LINE = 17  # pixels between two names


@dataclass(frozen=True)
class _Point:
    name: str
    x: float
    y: float
    line: float
    """Where its name stands, which keeps its distance from others."""
    hollow: bool


def scatter(group: Group) -> str | None:
    """An SVG: the first figure that is a number against the time over the baseline's.

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
    found = [
        (each.name, relative, float(each.figures[figure]))
        for each in group.candidates
        if figure in each.figures and (relative := group.relative(each.name)) is not None
    ]
    if len(found) < 2:
        return None
    low = math.floor(2 * math.log2(min(x for _, x, _ in found))) / 2
    high = math.ceil(2 * math.log2(max(x for _, x, _ in found))) / 2
    top = 1.1 * max(y for *_, y in found)

    def across(value: float) -> float:
        share = (math.log2(value) - low) / (high - low or 1.0)
        return round(_LEFT + share * (_RIGHT - _LEFT), 1)

    def up(value: float) -> float:
        return round(_BOTTOM - value / top * (_BOTTOM - _TOP), 1)

    step = 10 ** math.floor(math.log10(top))
    step = next(step * part for part in (1, 0.5, 0.2, 0.1) if top / (step * part) >= 4)
    largest = sorted(found, key=lambda each: -each[2])
    points = _named(
        ((name, across(x), up(y), name == group.baseline) for name, x, y in largest), _BOTTOM
    )
    halves = range(round(2 * low), round(2 * high) + 1)
    return (
        templates("benchmarks.support")
        .get_template("scatter.svg.j2")
        .render(
            width=WIDTH,
            height=HEIGHT,
            frame={"left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM},
            title=group.name,
            x_label=f"time relative to {group.baseline}",
            y_label=figure,
            x_ticks=[(across(2 ** (n / 2)), f"{2 ** (n / 2):.2g}") for n in halves],
            y_ticks=[(up(n * step), f"{n * step:.3g}") for n in range(int(top / step) + 1)],
            points=points,
        )
    )


# --- memory ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A memory mode."""

    name: str
    cost: float
    """Operations or seconds of a pair."""
    gib: float
    """At its worst moment."""
    hollow: bool = False
    """It changes the numbers."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The modes of one model."""

    name: str
    cost: str
    """What `Spot.cost` is."""
    spots: Sequence[Spot]


_WIDE, _END = 860, 600  # the picture, and where its frames end
_TALL, _GAP = 430, 62  # of a panel's frame, and between two; a line for each of two dozen names
_CARDS = 180  # pixels on the left, for the names of cards


def peaks(title: str, panels: Sequence[Panel], cards: Mapping[str, float]) -> str:
    """An SVG: peak memory against what a pair costs, a panel a model, cards' memories as lines.

    Memory is on a logarithmic axis; both are better towards the lower left.

    Args:
        title: Of the picture.
        panels: From the top down.
        cards: Name to GiB. Those of nearly the same size share a line.
    """
    bottom = _TOP + 16 + _TALL
    frame = {"left": _LEFT, "right": _END, "top": _TOP + 16, "bottom": bottom}
    drawn = [
        {
            **_axes(panel, _shared(cards), frame["top"], bottom),
            "offset": index * (_TALL + _GAP + 24),
        }
        for index, panel in enumerate(panels)
    ]
    return (
        templates("benchmarks.support")
        .get_template("peaks.svg.j2")
        .render(
            width=_WIDE,
            height=bottom + _GAP - 16 + (len(panels) - 1) * (_TALL + _GAP + 24),
            frame=frame,
            title=title,
            panels=drawn,
        )
    )


def _axes(panel: Panel, cards: Mapping[str, float], top: float, bottom: float) -> dict[str, object]:
    largest = sorted(panel.spots, key=lambda spot: -spot.gib)
    sizes = [spot.gib for spot in panel.spots] + list(cards.values())
    low = math.floor(math.log2(min(sizes)))
    high = math.ceil(math.log2(max(sizes)))
    costs = [spot.cost for spot in panel.spots]
    tick = 10 ** math.floor(math.log10(max(costs) - min(costs) or max(costs)))
    tick = next(
        t for t in (tick / 5, tick / 2, tick, 2 * tick) if (max(costs) - min(costs)) / t <= 7
    )
    first, last = math.floor(min(costs) / tick), math.ceil(max(costs) / tick)

    def across(cost: float) -> float:
        share = (cost / tick - first) / (last - first or 1)
        return round(_LEFT + _CARDS + share * (_END - _LEFT - _CARDS - 12), 1)

    def up(gib: float) -> float:
        share = (math.log2(gib) - low) / (high - low or 1)
        return round(bottom - share * (bottom - top), 1)

    return {
        "name": panel.name,
        "x_label": panel.cost,
        "y_label": "peak, GiB",
        "x_ticks": [(across(n * tick), f"{n * tick:g}") for n in range(first, last + 1)],
        "y_ticks": [(up(2**n), f"{2**n:g}") for n in range(low, high + 1)],
        "limits": [{"name": name, "y": up(gib)} for name, gib in cards.items()],
        "points": _named(
            ((spot.name, across(spot.cost), up(spot.gib), spot.hollow) for spot in largest),
            bottom,
        ),
    }


def _shared(cards: Mapping[str, float]) -> dict[str, float]:
    """Cards within a tenth of one another by one line, that of the smallest."""
    lines: list[tuple[list[str], float]] = []
    for name, gib in sorted(cards.items(), key=lambda card: card[1]):
        if lines and gib < 1.1 * lines[-1][1]:
            lines[-1][0].append(name)
        else:
            lines.append(([name], gib))
    return {f"{', '.join(names)}: {gib:.0f} GiB": gib for names, gib in lines}


def _named(found: Iterable[tuple[str, float, float, bool]], bottom: float) -> list[_Point]:
    """Points, each with a line for its name, no two of which touch.

    Args:
        found: From the top down: name, place across, place down, whether it is hollow.
        bottom: Where the last name stands at the lowest.
    """
    points: list[_Point] = []
    for name, x, y, hollow in found:
        line = max(y, points[-1].line + _LINE) if points else y
        points.append(_Point(name, x, y, line, hollow))
    # Names that were pushed out at the bottom push the others up again.
    limit = float(bottom)
    for index in range(len(points) - 1, -1, -1):
        point = points[index]
        line = min(point.line, limit)
        points[index] = _Point(point.name, point.x, point.y, line, point.hollow)
        limit = line - _LINE
    return points
