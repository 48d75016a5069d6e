"""What the page of an evaluation shows: one self-contained HTML file.

The videos are inside the file, or in files that it links to, and no request leaves it. Prompts,
names and settings are other people's text: jinja escapes all of it, and the page's own security
policy allows no other script.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_video.evaluation import charts
from dpo_video.evaluation.rendering import asset
from dpo_video.evaluation.verdict import MetricResult, Role
from dpo_video.support.formatting import apart, brief, counted
from dpo_video.support.report import StepReport
from dpo_video.training.diagnosis import WINDOW

Sides = tuple[bytes | str, bytes | str]
"""Videos of base and tuned model: mp4, or the address of a file."""


def page_context(
    metrics: Sequence[MetricResult],
    prompts: Sequence[str],
    seeds: Sequence[int | None],
    *,
    training: Sequence[StepReport] = (),
    videos: Sequence[Sides] = (),
) -> dict[str, Any]:
    """The variables of the page's template, except the evaluation itself.

    Args:
        metrics: The results.
        prompts: One prompt per video.
        seeds: One seed per prompt; None for a finished video.
        training: The reports of the training's steps.
        videos: mp4 (h264) of base and tuned model, one pair per prompt in the order of the prompts:
            bytes are embedded, a text is the address of a link. Empty leaves the videos out.

    Raises:
        ValueError: if there are videos, but not one pair per prompt.
    """
    if videos and len(videos) != len(prompts):
        raise ValueError(f"{len(videos)} pairs of videos for {len(prompts)} prompts")
    script = asset("evaluation.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    reach = _reach(metrics)
    cards = _cards(metrics, prompts, seeds, videos)
    return {
        "policy": f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'",
        "style": asset("evaluation.css"),
        "script": script,
        "witnesses": list(dict.fromkeys(m.witness.name for m in metrics if m.witness)),
        "rows": [_row(metric, reach) for metric in metrics],
        "reach": reach,
        "cards": cards,
        "hero": _typical(cards),
        "differences": [_differences(metric, cards) for metric in metrics],
        **training_context(training),
    }


def training_context(reports: Sequence[StepReport]) -> dict[str, Any]:
    """The variables of the section on the training; there are no curves of a single step."""
    return {
        "curves": _curves(reports) if len(reports) > 1 else [],
        "window": WINDOW,
        "size": {
            "width": charts.WIDTH,
            "height": charts.HEIGHT,
            "interval": charts.INTERVAL_WIDTH,
        },
    }


# --- the table -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Row:
    metric: MetricResult
    base: str
    tuned: str
    sign: str
    word: str
    interval: dict[str, float] | None
    """Positions in the drawing of the interval; None without a relative change."""
    limit: float | None
    """Position of a target's least effect, or of the tolerance of motion and guards."""


def _reach(metrics: Sequence[MetricResult]) -> float:
    """The largest relative change to draw: a round number, at most 100%."""
    ends = [
        abs(end)
        for metric in metrics
        for end in (metric.difference.relative_low, metric.difference.relative_high)
        if end is not None
    ]
    largest = max(ends, default=0.1)
    return next((step for step in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5) if largest <= step), 1.0)


def _row(metric: MetricResult, reach: float) -> _Row:
    sign, word = metric.mark
    change = metric.difference
    interval, limit = None, None
    if change.relative is not None:
        assert change.relative_low is not None and change.relative_high is not None
        interval = charts.interval(
            change.relative_low, change.relative, change.relative_high, reach
        )
        gain = metric.min_effect if metric.role is Role.TARGET else -metric.tolerance
        limit = charts.mark(gain if metric.higher_is_better else -gain, reach)
    base, tuned = apart(change.base_mean, change.tuned_mean)
    return _Row(
        metric=metric, base=base, tuned=tuned, sign=sign, word=word, interval=interval, limit=limit
    )


# --- the videos ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Score:
    label: str
    base: str
    tuned: str
    sign: str
    word: str
    gain: float
    """The difference; positive if it is better."""


@dataclass(frozen=True, kw_only=True)
class _Card:
    number: int
    prompt: str
    seed: int | None
    sources: tuple[str, str] | None
    """Base and tuned video inside the page."""
    links: tuple[str, str] | None
    """Their files, where they are not inside."""
    scores: list[_Score]


def _cards(
    metrics: Sequence[MetricResult],
    prompts: Sequence[str],
    seeds: Sequence[int | None],
    videos: Sequence[Sides],
) -> list[_Card]:
    cards = []
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        sources = links = None
        if videos:
            base, tuned = videos[index]
            if isinstance(base, str) or isinstance(tuned, str):
                links = (str(base), str(tuned))
            else:
                sources = (_embedded(base), _embedded(tuned))
        scores = [_score(metric, index) for metric in metrics]
        cards.append(
            _Card(
                number=index + 1,
                prompt=prompt,
                seed=seed,
                sources=sources,
                links=links,
                scores=scores,
            )
        )
    return cards


def _embedded(video: bytes) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(video).decode()}"


def embedding_order(metrics: Sequence[MetricResult], count: int) -> list[int]:
    """Indices of the videos in the order in which a page embeds them: the typical one first."""
    texts = [""] * count
    typical = _typical(_cards(metrics, texts, range(count), ()))
    first = 0 if typical is None else typical.number - 1
    return [first, *(index for index in range(count) if index != first)]


def _typical(cards: Sequence[_Card]) -> _Card | None:
    """The median card by its first metric."""
    if not cards or not cards[0].scores:
        return None
    return sorted(cards, key=lambda card: card.scores[0].gain)[len(cards) // 2]


def _score(metric: MetricResult, index: int) -> _Score:
    base, tuned = metric.base[index], metric.tuned[index]
    gain = tuned - base if metric.higher_is_better else base - tuned
    if not math.isfinite(gain):
        gain = 0.0
    sign, word = ("\N{CHECK MARK}", "better") if gain > 0 else ("", "equal")
    if gain < 0:
        sign, word = "\N{BALLOT X}", "worse"
    before, after = apart(base, tuned)
    return _Score(label=metric.label, base=before, tuned=after, sign=sign, word=word, gain=gain)


# --- charts ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Figure:
    """A chart with its texts."""

    title: str
    note: str
    chart: charts.Bars | charts.Curves
    summary: str
    """The chart in words, for screen readers."""
    labels: Sequence[dict[str, Any]] = ()
    """Number, word and title of each bar."""
    better_is_up: bool = False


def _differences(metric: MetricResult, cards: Sequence[_Card]) -> _Figure:
    """Every video's difference as a bar, the most improved first."""
    scores = {card.number: _score(metric, card.number - 1) for card in cards}
    order = sorted(cards, key=lambda card: -scores[card.number].gain)
    sign = 1 if metric.higher_is_better else -1
    change = metric.difference
    better = sum(score.word == "better" for score in scores.values())
    labels = []
    for card in order:
        score = scores[card.number]
        values = f"{score.base} to {score.tuned}"
        title = f"{card.number}. {card.prompt}: {values}"
        labels.append({"number": card.number, "word": score.word, "title": title})
    return _Figure(
        title=metric.label,
        note=f"{better} of {counted(len(cards), 'video')} better",
        chart=charts.bars(
            [sign * scores[card.number].gain for card in order],
            low=change.low,
            mean=change.difference,
            high=change.high,
        ),
        summary=f"Difference of {metric.label} for each of {counted(len(cards), 'video')}, "
        f"sorted: {better} better; mean {brief(change.difference)}, 95% interval "
        f"{brief(change.low)} to {brief(change.high)}.",
        labels=labels,
        better_is_up=metric.higher_is_better,
    )


def _curves(reports: Sequence[StepReport]) -> list[_Figure]:
    steps = [report.step for report in reports]

    def curve(
        title: str,
        note: str,
        values: dict[str, Callable[[StepReport], float]],
        lines: Sequence[tuple[float, str]] = (),
    ) -> _Figure:
        raw = {name: [value(report) for report in reports] for name, value in values.items()}
        smooth = {name: _trailing_mean(column) for name, column in raw.items()}
        ends = ", ".join(
            f"{name} from {brief(column[0])} to {brief(column[-1])}"
            for name, column in smooth.items()
        )
        return _Figure(
            title=title,
            note=note,
            chart=charts.curves(steps, raw, smooth, lines),
            summary=f"{title} from step {steps[0]} to {steps[-1]}: {ends}.",
        )

    last = reports[-1]
    changes: dict[str, Callable[[StepReport], float]] = {"chosen": lambda r: r.chosen_change}
    if last.compares:
        changes["rejected"] = lambda r: r.rejected_change
    always = [
        curve("loss", "learning below the line", {"loss": lambda r: r.loss}, _start_line(reports)),
        curve(
            "error against the reference" if last.reference else "error of the prediction",
            "chosen should not rise",
            changes,
            [(0.0, "")] if last.reference else [],
        ),
        curve("gradient norm", "before clipping", {"gradient norm": lambda r: r.grad_norm}),
    ]
    if not last.compares:
        return always
    return [
        *always[:2],
        curve("margin", "rejected minus chosen error", {"margin": lambda r: r.margin}, [(0.0, "")]),
        curve(
            "gradient factor",
            "0.5 at the start, 0 when saturated",
            {"gradient factor": lambda r: r.gradient_factor},
            [(0.5, "start")],
        ),
        curve(
            "accuracy and rejected-dominant pairs",
            "fraction of the pairs",
            {"accuracy": lambda r: r.accuracy, "rejected-dominant": lambda r: r.rejected_dominant},
            [(0.5, "chance")],
        ),
        always[2],
    ]


def _start_line(reports: Sequence[StepReport]) -> list[tuple[float, str]]:
    """The loss at the start: ln 2 for a logistic loss."""
    start = reports[0].loss
    if not math.isfinite(start):
        return [(math.log(2), "ln 2")]
    return [(start, "ln 2" if abs(start - math.log(2)) < 1e-3 else "start")]


def _trailing_mean(values: Sequence[float]) -> list[float]:
    """Mean of the finite values among the last WINDOW; nan where there is none."""
    means = []
    for end in range(1, len(values) + 1):
        finite = [value for value in values[max(0, end - WINDOW) : end] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means
