"""A race as a picture: what a contestant costs in time against what else is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpo_video.bench import Race
from dpo_video.report import templates

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
    yardstick: bool


def scatter(race: Race) -> str | None:
    """An SVG: the first figure that is a number against the time over the yardstick's.

    Time is on a logarithmic axis; both are better towards the lower left. None if there is no such
    figure, or the yardstick did not run.
    """
    numbers = (
        figure for each in race.contestants for figure, value in each.figures.items()
        if isinstance(value, float | int)
    )  # fmt: skip
    figure = next(numbers, None)
    if figure is None:
        return None
    found = [
        (each.name, relative, float(each.figures[figure]))
        for each in race.contestants
        if figure in each.figures and (relative := race.relative(each.name)) is not None
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
    points: list[_Point] = []
    for name, x, y in sorted(found, key=lambda each: -each[2]):
        line = max(up(y), points[-1].line + _LINE) if points else up(y)
        points.append(_Point(name, across(x), up(y), line, name == race.yardstick))
    # Names that were pushed out at the bottom push the others up again.
    limit = float(_BOTTOM)
    for index in range(len(points) - 1, -1, -1):
        point = points[index]
        line = min(point.line, limit)
        points[index] = _Point(point.name, point.x, point.y, line, point.yardstick)
        limit = line - _LINE
    halves = range(round(2 * low), round(2 * high) + 1)
    return (
        templates()
        .get_template("race.svg.j2")
        .render(
            width=WIDTH,
            height=HEIGHT,
            frame={"left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM},
            title=race.name,
            x_label=f"time over that of {race.yardstick}",
            y_label=figure,
            x_ticks=[(across(2 ** (n / 2)), f"{2 ** (n / 2):.2g}") for n in halves],
            y_ticks=[(up(n * step), f"{n * step:.3g}") for n in range(int(top / step) + 1)],
            points=points,
        )
    )
