"""Measure videos batch by batch with the metrics of an evaluation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dpo_video.errors import PluginError, UserError
from dpo_video.evaluation.change import Witness
from dpo_video.evaluation.verdict import MetricResult, Role
from dpo_video.evaluation.videos import VideoRecord
from dpo_video.registry.attribution import plugin_of, sentence
from dpo_video.registry.returned import checked
from dpo_video.settings import EvaluateSettings
from dpo_video.strategies import Metric
from dpo_video.types import Videos


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A metric without a result."""

    name: str
    reason: str
    """The reason, as a sentence."""
    error: Exception | None = None
    """The exception of a plugin's metric."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The metrics on the videos of both models."""

    metrics: tuple[MetricResult, ...]
    left_out: tuple[LeftOut, ...] = ()


@dataclass
class _Ruler:
    """A metric, or the second method of one."""

    metric: Metric
    key: str
    """Its name in the records of videos; it changes with the metric's options."""
    witness: bool = False
    error: Exception | None = None
    """Why it measures no more videos."""


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """A metric with its second method."""

    name: str
    first: _Ruler
    second: _Ruler | None
    second_name: str = ""
    no_second: str = ""
    """Why there is no second method, as a sentence."""


@dataclass
class Meters:
    """The metrics of an evaluation.

    A plugin's metric that fails measures no further videos; so does a second method that fails.
    """

    pairs: list[_Pair] = field(default_factory=list)

    @classmethod
    def of(cls, metrics: Mapping[str, Metric]) -> Meters:
        """The metrics by name, each with its second method (`Metric.witness`)."""
        return cls([_pair(name, metric) for name, metric in metrics.items()])

    @property
    def keys(self) -> list[str]:
        """What the record of a measured video holds."""
        return [ruler.key for ruler in self._rulers()]

    def measure(
        self, videos: Videos, prompts: Sequence[str]
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """The values of every metric by key, and why a metric failed by key.

        Raises:
            UserError: if a metric asks for something, such as a missing file.
            Exception: that of a built-in metric.
        """
        values: dict[str, list[float]] = {}
        failed: dict[str, str] = {}
        for ruler in self._rulers():
            plugin = plugin_of(ruler.metric)
            if ruler.error is None:
                try:
                    values[ruler.key] = _values(ruler.metric, videos, prompts)
                except Exception as error:
                    asks = isinstance(error, UserError) and not isinstance(error, PluginError)
                    excused = ruler.witness if asks else plugin is not None
                    if not excused:
                        raise
                    ruler.error = error
            if ruler.error is not None:
                failed[ruler.key] = (
                    str(ruler.error)
                    if plugin is None or isinstance(ruler.error, UserError)
                    else sentence(plugin, ruler.error)
                )
        return values, failed

    def results(
        self,
        base: Sequence[VideoRecord],
        tuned: Sequence[VideoRecord],
        prompts: Sequence[str],
        settings: EvaluateSettings,
    ) -> Measurement:
        """The metrics on measured videos. A metric without finite values is left out.

        Raises:
            UserError: if every target metric is left out.
            Exception: the exception of a plugin's metric, if it is the reason.
        """
        found = [self._result(pair, base, tuned, prompts, settings) for pair in self.pairs]
        results = tuple(each for each in found if isinstance(each, MetricResult))
        left_out = tuple(each for each in found if isinstance(each, LeftOut))
        if left_out and not any(result.role is Role.TARGET for result in results):
            _refuse(left_out)
        return Measurement(metrics=results, left_out=left_out)

    def check_targets(
        self, records: Sequence[VideoRecord], which: str, prompts: Sequence[str]
    ) -> None:
        """Raise as `results` if these videos leave no target: before the others are drawn."""
        targets = [pair for pair in self.pairs if Role(pair.first.metric.role) is Role.TARGET]
        out = [_left_out(pair, {which: records}, prompts) for pair in targets]
        lost = [each for each in out if each is not None]
        if lost and len(lost) == len(targets):
            _refuse(lost)

    def _result(
        self,
        pair: _Pair,
        base: Sequence[VideoRecord],
        tuned: Sequence[VideoRecord],
        prompts: Sequence[str],
        settings: EvaluateSettings,
    ) -> MetricResult | LeftOut:
        lost = _left_out(pair, {"base": base, "tuned": tuned}, prompts)
        if lost is not None:
            return lost
        before, after = ([r.values[pair.first.key] for r in side] for side in (base, tuned))
        witness, no_witness = None, pair.no_second
        if pair.second is not None:
            no_witness = _failure(pair.second, (*base, *tuned))
            if not no_witness:
                second = [[r.values[pair.second.key] for r in side] for side in (base, tuned)]
                if all(map(math.isfinite, (*second[0], *second[1]))):
                    witness = Witness.measured(pair.second_name, *second, prompts=prompts)
                else:
                    no_witness = f"A value by {pair.second_name} is not finite."
        metric = pair.first.metric
        return MetricResult.measured(
            pair.name,
            before,
            after,
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
            role=Role(metric.role),
            prompts=prompts,
            min_effect=settings.min_effects.get(pair.name, settings.min_effect),
            tolerance=settings.tolerance,
            witness=witness,
            no_witness=no_witness,
        )

    def _rulers(self) -> list[_Ruler]:
        return [each for pair in self.pairs for each in (pair.first, pair.second) if each]


def _pair(name: str, metric: Metric) -> _Pair:
    first = _Ruler(metric, f"{name} {_digest(metric)}")
    try:
        found = metric.witness()
    except UserError as error:
        return _Pair(name=name, first=first, second=None, no_second=str(error))
    except Exception as error:
        if (plugin := plugin_of(metric)) is None:
            raise
        return _Pair(name=name, first=first, second=None, no_second=sentence(plugin, error))
    if found is None:
        return _Pair(name=name, first=first, second=None)
    second_name, other = found
    second = _Ruler(other, f"{name} by {second_name} {_digest(other)}", witness=True)
    return _Pair(name=name, first=first, second=second, second_name=second_name)


def _digest(metric: Metric) -> str:
    """A hash of what a metric is: its class, its options, and a plugin's version."""
    kind, plugin = type(metric), plugin_of(metric)
    version = "" if plugin is None else plugin.distribution
    told = f"{kind.__module__}.{kind.__qualname__} {version} {metric.model_dump_json()}"
    return hashlib.sha256(told.encode()).hexdigest()[:10]


def _values(metric: Metric, videos: Videos, prompts: Sequence[str]) -> list[float]:
    found = metric(videos, prompts)
    checked(metric, "values", found, (len(videos),), finite=False)  # those are left out later
    return [float(value) for value in found]


def _failure(ruler: _Ruler, records: Sequence[VideoRecord]) -> str:
    """Why a metric has no value of some video; empty if it has all."""
    return next((r.failed[ruler.key] for r in records if ruler.key in r.failed), "")


def _left_out(
    pair: _Pair, sides: Mapping[str, Sequence[VideoRecord]], prompts: Sequence[str]
) -> LeftOut | None:
    every = [record for side in sides.values() for record in side]
    if reason := _failure(pair.first, every):
        return LeftOut(name=pair.name, reason=reason, error=pair.first.error)
    for which, side in sides.items():
        for prompt, record in zip(prompts, side, strict=True):
            value = record.values[pair.first.key]
            if not math.isfinite(value):
                reason = (
                    f"The metric '{pair.name}' is left out: it is {value} for the {which} model's "
                    f"video of '{prompt}'. Select other metrics with --metric NAME, or fix it."
                )
                return LeftOut(name=pair.name, reason=reason)
    return None


def _refuse(left_out: Sequence[LeftOut]) -> None:
    for metric in left_out:
        raise metric.error or UserError(metric.reason)
