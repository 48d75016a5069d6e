"""The evaluation as one self-contained page: no request leaves it, nothing in it is trusted.

The page is HTML with the videos inside. Charts are SVG drawn by the template, so that they take the
page's colours in light and in dark. Prompts, names and settings are other people's text: jinja
escapes all of it, and the page's own security policy lets no script run but ours.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dpo_video.evaluation.results import Evaluation, mark
from dpo_video.evaluation.verdict import MetricResult, Role
from dpo_video.support.formatting import brief, option, percent
from dpo_video.training.diagnosis import WINDOW, StepReport

# Charts are drawn at about the size they are shown, so that their text stays readable on a phone.
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 12, 24
FOREST = 220  # width of an interval drawn in the table


def render_evaluation(evaluation: Evaluation, videos: Sequence[tuple[bytes, bytes]] = ()) -> str:
    """Make the page.

    Args:
        evaluation: what was found.
        videos: mp4 (h264) of base and tuned, one pair a prompt in the order of the prompts; empty
            leaves the videos out.

    Raises:
        ValueError: the videos are neither none nor one pair a prompt.
    """
    if videos and len(videos) != len(evaluation.prompts):
        raise ValueError(f"{len(videos)} pairs of videos for {len(evaluation.prompts)} prompts")
    environment = templates()
    script = _asset(environment, "evaluation.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    reach = _reach(evaluation.metrics)
    cards = _cards(evaluation, videos)
    return environment.get_template("evaluation.html.j2").render(
        evaluation=evaluation,
        policy=f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'",
        style=_asset(environment, "evaluation.css"),
        script=script,
        rows=[_row(metric, reach, evaluation.tolerance) for metric in evaluation.metrics],
        reach=reach,
        cards=cards,
        hero=_typical(cards),
        waterfalls=[_waterfall(metric, evaluation.prompts) for metric in evaluation.metrics],
        curves=_curves(evaluation.training) if len(evaluation.training) > 1 else [],
        window=WINDOW,
        size={"width": WIDTH, "height": HEIGHT, "forest": FOREST},
    )


def templates(package: str = "dpo_video.evaluation") -> Environment:
    """The package's templates: everything that goes into them is escaped."""
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(brief=brief, percent=percent, option=option)
    return environment


def _asset(environment: Environment, name: str) -> Markup:
    """A file of ours that goes into the page as it is."""
    loader = environment.loader
    assert loader is not None
    return Markup(loader.get_source(environment, name)[0])


# --- the table -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Row:
    metric: MetricResult
    sign: str
    word: str
    forest: dict[str, float] | None
    """Places in the interval's drawing; None without a relative change."""


def _reach(metrics: Sequence[MetricResult]) -> float:
    """The largest relative change to draw: a round share, at most 100%."""
    ends = [
        abs(end)
        for metric in metrics
        for end in (metric.difference.relative_low, metric.difference.relative_high)
        if end is not None
    ]
    largest = max(ends, default=0.1)
    return next((step for step in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5) if largest <= step), 1.0)


def _row(metric: MetricResult, reach: float, tolerance: float) -> _Row:
    sign, word = mark(metric)
    change = metric.difference

    def place(share: float) -> float:
        inside = min(max(share / reach, -1.0), 1.0)
        return round(FOREST / 2 + inside * (FOREST / 2 - 8), 1)

    forest = None
    if change.relative is not None:
        assert change.relative_low is not None and change.relative_high is not None
        forest = {
            "low": place(change.relative_low),
            "mean": place(change.relative),
            "high": place(change.relative_high),
        }
        if metric.role is Role.MOTION:
            forest["limit"] = place(-tolerance)
    return _Row(metric=metric, sign=sign, word=word, forest=forest)


# --- the videos ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Score:
    label: str
    base: float
    tuned: float
    sign: str
    word: str
    gain: float
    """The difference, positive where it is better."""


@dataclass(frozen=True, kw_only=True)
class _Card:
    number: int
    prompt: str
    seed: int
    sources: tuple[str, str] | None
    scores: list[_Score]


def _cards(evaluation: Evaluation, videos: Sequence[tuple[bytes, bytes]]) -> list[_Card]:
    cards = []
    for index, (prompt, seed) in enumerate(zip(evaluation.prompts, evaluation.seeds, strict=True)):
        sources = None
        if videos:
            base, tuned = (
                f"data:video/mp4;base64,{base64.b64encode(video).decode()}"
                for video in videos[index]
            )
            sources = (base, tuned)
        scores = [_score(metric, index) for metric in evaluation.metrics]
        cards.append(
            _Card(number=index + 1, prompt=prompt, seed=seed, sources=sources, scores=scores)
        )
    return cards


def _typical(cards: Sequence[_Card]) -> _Card | None:
    """The card in the middle by its first metric: neither the best nor the worst."""
    if not cards or not cards[0].scores:
        return None
    return sorted(cards, key=lambda card: card.scores[0].gain)[len(cards) // 2]


def _score(metric: MetricResult, index: int) -> _Score:
    base, tuned = metric.base[index], metric.tuned[index]
    gain = tuned - base if metric.higher_is_better else base - tuned
    if not math.isfinite(gain):
        gain = 0.0
    sign, word = ("\N{BLACK UP-POINTING TRIANGLE}", "better") if gain > 0 else ("", "equal")
    if gain < 0:
        sign, word = "\N{BLACK DOWN-POINTING TRIANGLE}", "worse"
    return _Score(label=metric.label, base=base, tuned=tuned, sign=sign, word=word, gain=gain)


# --- charts ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Values to places along one side of a chart, in user units of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts of three to six round values."""
        rough = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        # 12 digits: 3 * 0.1 is to be written as 0.3.
        values = [float(f"{i * step:.12g}") for i in range(first, last + 1)]
        return [(self(value), _tick(value)) for value in values]


def _tick(value: float) -> str:
    return ("\N{MINUS SIGN}" if value < 0 else "") + option(abs(value))


def _vertical(values: Sequence[float]) -> _Axis:
    """The axis upwards that holds the values, with some air."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    air = 0.06 * (high - low) or abs(high) or 1.0
    return _Axis(low=low - air, high=high + air, start=HEIGHT - BOTTOM, end=TOP)


@dataclass(frozen=True, kw_only=True)
class _Series:
    name: str
    style: str
    """Class of its line: what tells it apart beside its colour."""
    raw: str
    """Path of every report."""
    smooth: str
    """Path of the trailing mean."""


@dataclass(frozen=True, kw_only=True)
class _Chart:
    title: str
    note: str
    x: _Axis
    y: _Axis
    series: list[_Series] = field(default_factory=list)
    lines: list[tuple[float, str]] = field(default_factory=list)
    """Places and texts of horizontal reference lines."""
    bars: list[dict[str, Any]] = field(default_factory=list)
    band: dict[str, float] | None = None
    """Places of the mean and of its interval."""
    better_is_up: bool = False
    summary: str = ""
    """The chart in words, for those who do not see it."""


def _waterfall(metric: MetricResult, prompts: Sequence[str]) -> _Chart:
    """Every video's difference as a bar, the most improved first."""
    scores = [_score(metric, index) for index in range(len(prompts))]
    order = sorted(range(len(scores)), key=lambda index: -scores[index].gain)
    differences = [
        gain if metric.higher_is_better else -gain for gain in (score.gain for score in scores)
    ]
    change = metric.difference
    y = _vertical([0.0, *differences, change.low, change.high])
    x = _Axis(low=0, high=len(order), start=LEFT, end=WIDTH - RIGHT)
    width = (x.end - x.start) / len(order)
    bars = []
    for rank, index in enumerate(order):
        top, bottom = sorted((y(0), y(differences[index])))
        bars.append(
            {
                "number": index + 1,
                "word": scores[index].word,
                "x": round(x(rank) + 0.12 * width, 1),
                "width": round(0.76 * width, 2),
                "y": top,
                "height": round(max(bottom - top, 0.5), 1),
                "title": f"{index + 1}. {prompts[index]}: {brief(scores[index].base)} to "
                f"{brief(scores[index].tuned)}",
            }
        )
    better = sum(score.word == "better" for score in scores)
    return _Chart(
        title=metric.label,
        note=f"{better} of {len(scores)} videos better",
        x=x,
        y=y,
        bars=bars,
        band={"low": y(change.low), "mean": y(change.difference), "high": y(change.high)},
        better_is_up=metric.higher_is_better,
        summary=f"Difference of {metric.label} for each of {len(scores)} videos, sorted: {better} "
        f"better; mean {brief(change.difference)}, 95% interval {brief(change.low)} to "
        f"{brief(change.high)}.",
    )


def _curves(reports: Sequence[StepReport]) -> list[_Chart]:
    def curve(
        title: str,
        note: str,
        values: dict[str, Callable[[StepReport], float]],
        lines: Sequence[tuple[float, str]] = (),
    ) -> _Chart:
        columns = {name: [value(report) for report in reports] for name, value in values.items()}
        smooth = {name: _trailing_mean(column) for name, column in columns.items()}
        every = [value for column in columns.values() for value in column if math.isfinite(value)]
        # A few wild steps must not flatten all others; what lies outside is cut off.
        shown = [float(q) for q in np.quantile(every, [0.02, 0.98])] if every else []
        means = [value for column in smooth.values() for value in column]
        y = _vertical([*shown, *means, *(value for value, _ in lines)])
        first, last = reports[0].step, reports[-1].step
        x = _Axis(low=first, high=max(last, first + 1), start=LEFT, end=WIDTH - RIGHT)
        steps = [report.step for report in reports]
        series = [
            _Series(
                name=name,
                style=("first", "second")[place],
                raw=_path(x, y, steps, columns[name]),
                smooth=_path(x, y, steps, smooth[name]),
            )
            for place, name in enumerate(columns)
        ]
        ends = ", ".join(
            f"{name} from {brief(smooth[name][0])} to {brief(smooth[name][-1])}" for name in columns
        )
        return _Chart(
            title=title,
            note=note,
            x=x,
            y=y,
            series=series,
            lines=[(y(value), text) for value, text in lines],
            summary=f"{title} from step {first} to {last}: {ends}.",
        )

    return [
        curve(
            "loss", "below the line, it learns", {"loss": lambda r: r.loss}, _start_line(reports)
        ),
        curve(
            "error against the reference",
            "chosen should not rise",
            {"chosen": lambda r: r.chosen_change, "rejected": lambda r: r.rejected_change},
            [(0.0, "")],
        ),
        curve("margin", "rejected less chosen error", {"margin": lambda r: r.margin}, [(0.0, "")]),
        curve(
            "gradient factor",
            "0.5: as at the start; 0: saturated",
            {"gradient factor": lambda r: r.gradient_factor},
            [(0.5, "start")],
        ),
        curve(
            "accuracy and loser-dominant share",
            "of pairs",
            {"accuracy": lambda r: r.accuracy, "loser-dominant": lambda r: r.loser_dominant},
            [(0.5, "coin")],
        ),
        curve("gradient norm", "before clipping", {"gradient norm": lambda r: r.grad_norm}),
    ]


def _start_line(reports: Sequence[StepReport]) -> list[tuple[float, str]]:
    """Where the loss began: ln 2, or what this loss has in its place."""
    start = reports[0].loss
    if not math.isfinite(start):
        return [(math.log(2), "ln 2")]
    return [(start, "ln 2" if abs(start - math.log(2)) < 1e-3 else "start")]


def _trailing_mean(values: Sequence[float]) -> list[float]:
    """Mean of the finite ones among the last WINDOW values; nan where there is none."""
    means = []
    for end in range(1, len(values) + 1):
        finite = [value for value in values[max(0, end - WINDOW) : end] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _path(x: _Axis, y: _Axis, steps: Sequence[int], values: Sequence[float]) -> str:
    """An SVG path with gaps where a value is not finite."""
    points = [
        (x(step), y(value)) if math.isfinite(value) else None
        for step, value in zip(steps, values, strict=True)
    ]
    parts = []
    for before, point in pairwise([None, *points]):
        if point is not None:
            parts.append(f"{'L' if before is not None else 'M'}{point[0]} {point[1]}")
    return "".join(parts)
