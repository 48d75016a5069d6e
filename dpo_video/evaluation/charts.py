"""All charts of pages and documents. No other module computes scales, ticks or positions.

A chart is plain data in units of its SVG drawing; `templates/charts.svg.j2` draws it. Inside a page
it takes the page's colours, light or dark; a file of its own brings a style.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dpo_video.evaluation.rendering import templates
from dpo_video.support.formatting import MINUS, option

# Small charts are drawn at about their size on the page, so that text stays readable on a phone.
WIDTH, HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 12, 24
INTERVAL_WIDTH = 220  # of an interval in the table of metrics
_AIR = 0.06  # fraction of the range that an axis leaves free at each end
_SMALLEST = 1e-300  # range of an axis: with less, its logarithm may have no value
_LABEL_HEIGHT = 17  # pixels between two labels
_LETTER = 7  # pixels that a letter of a label is wide, on average


def _signed(value: float) -> str:
    return (MINUS if value < 0 else "") + option(abs(value))


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear or logarithmic scale: data from `low` to `high`, positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    step: float
    """Distance of two ticks; on a logarithmic axis in octaves."""
    log: bool = False
    text: Callable[[float], str] = _signed
    label: str = ""

    def __call__(self, value: float) -> float:
        """The position of a value."""
        low, high, value = map(math.log2, (self.low, self.high, value)) if self.log else (
            self.low, self.high, value,
        )  # fmt: skip
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Positions and texts of the round values within the axis."""
        low, high = (
            (math.log2(end) if self.log else end) / self.step for end in (self.low, self.high)
        )
        numbers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        # 12 digits, so that 3 * 0.1 is written as 0.3.
        values = [float(f"{n * self.step:.12g}") for n in numbers]
        values = [2**value for value in values] if self.log else values
        return [(self(value), self.text(value)) for value in values]


def linear(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    air: float = _AIR,
    ticks: int = 4,
    text: Callable[[float], str] = _signed,
    label: str = "",
) -> Axis:
    """A linear axis that holds all finite values, with about `ticks` round intervals."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    margin = air * (high - low)
    if high - low < _SMALLEST:
        margin = abs(high) if abs(high) > _SMALLEST else 1.0
    low, high = low - margin, high + margin
    rough = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough)
    return Axis(low=low, high=high, start=start, end=end, step=step, text=text, label=label)


def log2(
    values: Sequence[float],
    start: float,
    end: float,
    *,
    steps: Sequence[float] = (0.5, 1, 2, 4, 8),
    text: Callable[[float], str] = _signed,
    label: str = "",
) -> Axis:
    """A logarithmic axis that holds all values, from tick to tick, at most about 8 of them.

    `steps` are the distances of ticks to choose from, in octaves.
    """
    span = math.log2(max(values) / min(values))
    step = next((step for step in steps if span / step <= 8), steps[-1])
    low = math.floor(math.log2(min(values)) / step)
    high = max(math.ceil(math.log2(max(values)) / step), low + 1)
    return Axis(
        low=2 ** (low * step), high=2 ** (high * step), start=start, end=end, step=step, log=True,
        text=text, label=label,
    )  # fmt: skip


# --- charts of a page ----------------------------------------------------------------------------


def interval(low: float, mean: float, high: float, reach: float) -> dict[str, float]:
    """Positions of a mean and its interval on an axis from -reach to reach."""
    return {"low": mark(low, reach), "mean": mark(mean, reach), "high": mark(high, reach)}


def mark(value: float, reach: float) -> float:
    """Position of one value on the axis of `interval`; values outside lie on its ends."""
    axis = Axis(low=-reach, high=reach, start=8, end=INTERVAL_WIDTH - 8, step=reach)
    return axis(min(max(value, -reach), reach))


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One bar per value, above or below zero, and a band for their mean."""

    x: Axis
    y: Axis
    bars: tuple[dict[str, float], ...]
    """x, y, width and height."""
    band: dict[str, float]
    """low, mean and high."""


def bars(values: Sequence[float], *, low: float, mean: float, high: float) -> Bars:
    """Draw values as bars from zero, in the given order."""
    y = linear([0.0, *values, low, high], HEIGHT - _BOTTOM, _TOP)
    x = Axis(low=0, high=len(values), start=_LEFT, end=WIDTH - _RIGHT, step=1)
    width = (x.end - x.start) / len(values)
    drawn = []
    for rank, value in enumerate(values):
        top, bottom = sorted((y(0), y(value)))
        drawn.append(
            {
                "x": round(x(rank) + 0.12 * width, 1),
                "width": round(0.76 * width, 2),
                "y": top,
                "height": round(max(bottom - top, 0.5), 1),
            }
        )
    return Bars(x=x, y=y, bars=tuple(drawn), band={"low": y(low), "mean": y(mean), "high": y(high)})


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart, as SVG paths."""

    name: str
    style: str
    """Class of the line, which differs in more than its colour."""
    raw: str
    smooth: str


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Values over the steps of a run."""

    x: Axis
    y: Axis
    curves: tuple[Curve, ...]
    lines: tuple[tuple[float, str], ...]
    """Positions and texts of horizontal reference lines."""


def curves(
    steps: Sequence[int],
    raw: Mapping[str, Sequence[float]],
    smooth: Mapping[str, Sequence[float]],
    lines: Sequence[tuple[float, str]] = (),
) -> Curves:
    """Draw up to two series by name, each as raw values and as a smoothed line.

    The axis holds the smoothed values and the raw values between their 2% and 98% quantiles, so
    that a few wild steps do not flatten the others.
    """
    finite = [value for column in raw.values() for value in column if math.isfinite(value)]
    typical = [float(q) for q in np.quantile(finite, [0.02, 0.98])] if finite else []
    means = [value for column in smooth.values() for value in column]
    y = linear([*typical, *means, *(value for value, _ in lines)], HEIGHT - _BOTTOM, _TOP)
    x = linear([steps[0], max(steps[-1], steps[0] + 1)], _LEFT, WIDTH - _RIGHT, air=0.0)
    drawn = tuple(
        Curve(
            name=name,
            style=("first", "second")[index],
            raw=_path(x, y, steps, raw[name]),
            smooth=_path(x, y, steps, smooth[name]),
        )
        for index, name in enumerate(raw)
    )
    return Curves(x=x, y=y, curves=drawn, lines=tuple((y(value), text) for value, text in lines))


def _path(x: Axis, y: Axis, steps: Sequence[int], values: Sequence[float]) -> str:
    """An SVG path with gaps at values that are not finite."""
    points = [
        (x(step), y(value)) if math.isfinite(value) else None
        for step, value in zip(steps, values, strict=True)
    ]
    parts = []
    for before, point in pairwise([None, *points]):
        if point is not None:
            parts.append(f"{'L' if before is not None else 'M'}{point[0]} {point[1]}")
    return "".join(parts)


# --- scatter plots -------------------------------------------------------------------------------


class Spread(NamedTuple):
    """A value and its interval, whose ends can lie outside of the picture."""

    value: float
    low: float
    high: float
    cut_low: bool = False
    cut_high: bool = False

    @classmethod
    def exact(cls, value: float) -> Spread:
        """A value without an interval."""
        return cls(value, value, value)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A mark with a name."""

    name: str
    x: Spread
    y: Spread
    hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One scatter plot; its axes are made by `x` and `y` from the values and two ends."""

    points: Sequence[Point]
    x: Callable[[Sequence[float], float, float], Axis]
    y: Callable[[Sequence[float], float, float], Axis]
    title: str = ""
    origin: str = ""
    """Name of the point (0, 0), through which lines are drawn; none if empty."""
    limits: Mapping[str, float] | None = None
    """Names and heights of horizontal lines."""


def scatter(
    title: str,
    panels: Sequence[Panel],
    *,
    width: float = 352,
    height: float = 328,
    inline: bool = False,
) -> str:
    """Draw panels below each other: marks with numbers, whose names are right of each panel.

    Args:
        title: Title for people who cannot see it.
        panels: From the top down.
        width: Width of a panel's frame.
        height: Height of a panel's frame; more if the names need it.
        inline: Whether it is part of a page that has its style.
    """
    left, gap = 72.0, 62.0
    drawn, top = [], 24.0
    for panel in panels:
        top += 16.0 if panel.title else 0.0
        tall = max(height, _LABEL_HEIGHT * len(panel.points))
        drawn.append(_panel(panel, left, top, left + width, top + tall))
        top += tall + gap
    longest = max(len(point.name) for panel in panels for point in panel.points)
    return (
        templates()
        .get_template("scatter.svg.j2")
        .render(
            title=title,
            panels=drawn,
            width=round(left + width + 40 + _LETTER * longest),
            height=round(top - 14),
            inline=inline,
        )
    )


def _panel(panel: Panel, left: float, top: float, right: float, bottom: float) -> dict[str, object]:
    limits = panel.limits or {}
    zero = [0.0] if panel.origin else []
    xs = [value for point in panel.points for value in point.x[:3]] + zero
    ys = [value for point in panel.points for value in point.y[:3]] + zero + list(limits.values())
    # Points are right of the names of the limits.
    names = 6.0 + _LETTER * max(map(len, limits), default=-1)
    x = panel.x(xs, left + names, right - (12.0 if limits else 0.0))
    y = panel.y(ys, bottom, top)
    points = sorted(panel.points, key=lambda point: -point.y.value)
    return {
        "title": panel.title,
        "frame": {"left": left, "right": right, "top": top, "bottom": bottom},
        "x": x,
        "y": y,
        "origin": panel.origin,
        "limits": [(name, y(value)) for name, value in limits.items()],
        "points": [
            {
                "name": point.name,
                "x": x(point.x.value),
                "y": y(point.y.value),
                "ends": _ends(point, x, y),
                "hollow": point.hollow,
                "label": top + 6 + _LABEL_HEIGHT * rank,
            }
            for rank, point in enumerate(points)
        ],
    }


def _ends(point: Point, x: Axis, y: Axis) -> list[dict[str, float]]:
    """The ends of the intervals: position, direction as an angle, and whether they are cut."""
    return [
        {"x": x(end), "y": y(point.y.value), "angle": angle, "cut": cut}
        for end, angle, cut in (
            (point.x.low, 180, point.x.cut_low),
            (point.x.high, 0, point.x.cut_high),
        )
        if point.x.low != point.x.high
    ] + [
        {"x": x(point.x.value), "y": y(end), "angle": angle, "cut": cut}
        for end, angle, cut in (
            (point.y.low, 90, point.y.cut_low),
            (point.y.high, 270, point.y.cut_high),
        )
        if point.y.low != point.y.high
    ]
