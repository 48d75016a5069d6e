"""Confidence intervals of paired differences, and agreement of raters. NumPy only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Array = NDArray[np.float64]


class Record(BaseModel):
    """Base of stored records: frozen, no unknown fields, and valid JSON even with NaN values."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )


class PairedDifference(Record):
    """The mean of tuned - base over pairs of the same prompt and noise, with 95% intervals."""

    pairs: int
    """Number of pairs with finite values (in every run, if there are several)."""
    prompts: int
    """Number of different prompts among them: the sample size of the intervals."""
    runs: int = 1
    """Number of training runs."""
    base_mean: float
    tuned_mean: float
    difference: float
    """tuned_mean - base_mean."""
    low: float
    high: float
    relative: float | None
    """difference / |base_mean|; None where the base's mean is 0."""
    relative_low: float | None
    relative_high: float | None


def paired_difference(
    base: Sequence[float] | Array,
    tuned: Sequence[float] | Sequence[Sequence[float]] | Array,
    *,
    prompts: Sequence[str] | None = None,
) -> PairedDifference:
    """Mean paired difference and its size relative to the base, with 95% intervals.

    The sample of an evaluation is a prompt: several videos of one prompt are one cluster, because
    they are not independent. Difference and relative change are both ratios of sums over prompts.

    With one training run, the interval is Student's t on the jackknife values of the prompts, with
    Hall's correction for skewness (Hall 1992, "On the removal of skewness by transformation",
    J. R. Stat. Soc. B 54) and as many degrees of freedom as the kurtosis leaves the variance
    (Cramer 1946, 27.4).

    With several runs (training seeds), prompts and runs are crossed random effects. With mean
    squares `A` of the runs, `B` of the prompts and `E` of the residual, each divided by the number
    of values, the half-width is `sqrt(t_runs^2 A + t_prompts^2 max(B - E, 0))`: each variance with
    the quantile of its own degrees of freedom (Banerjee 1960), so that three runs give the interval
    of three runs however many prompts there are.

    Where no value is below 0, nothing can fall by more than all of it: the relative interval ends
    at -1.

    `python -m benchmarks.coverage` measures how often the intervals cover the truth.

    Args:
        base: One value per pair.
        tuned: Values of the same pairs in the same order; one such sequence per training run.
        prompts: The prompt of each pair; all different if None.

    Raises:
        ValueError: if the lengths differ, or fewer than 2 prompts have finite pairs.
    """
    before = np.asarray(base, dtype=np.float64)
    after = np.atleast_2d(np.asarray(tuned, dtype=np.float64))
    names = range(len(before)) if prompts is None else prompts
    if after.shape[1] != len(before) or len(names) != len(before):
        raise ValueError(
            f"{len(before)} base values cannot be paired with {after.shape[1]} tuned ones of "
            f"{len(names)} prompts"
        )
    finite = np.isfinite(before) & np.isfinite(after).all(axis=0)
    numbers: dict[object, int] = {}
    cluster = np.array(
        [
            numbers.setdefault(name, len(numbers))
            for name, ok in zip(names, finite, strict=True)
            if ok
        ],
        dtype=np.intp,
    )
    if len(numbers) < 2:
        raise ValueError(f"an interval needs finite pairs of 2 prompts or more, not {len(numbers)}")

    def sums(values: Array) -> Array:
        return np.bincount(cluster, values).astype(np.float64)

    least = -1.0 if min(before[finite].min(), after[:, finite].min()) >= 0 else -math.inf
    size, before = sums(np.ones(len(cluster))), sums(before[finite])
    change = np.stack([sums(run[finite]) for run in after]) - before
    base_mean = float(before.sum() / size.sum())
    difference, low, high = _ratio(change, size)
    relative = _ratio(change, before * np.sign(base_mean)) if _has_sign(before, size) else None
    return PairedDifference(
        pairs=int(finite.sum()),
        prompts=len(numbers),
        runs=len(after),
        base_mean=base_mean,
        tuned_mean=base_mean + difference,
        difference=difference,
        low=low,
        high=high,
        relative=relative and relative[0],
        relative_low=relative and max(relative[1], least),
        relative_high=relative and relative[2],
    )


def _has_sign(base: Array, size: Array) -> bool:
    """Whether a change can be relative to the base's mean: it is clearly not 0."""
    if (base > 0).all() or (base < 0).all():
        return True
    _, low, high = _ratio(base[None], size)
    return low > 0 or high < 0


def _ratio(change: Array, scale: Array) -> tuple[float, float, float]:
    """`change.sum() / scale.sum()`, a mean over the runs, with its 95% interval.

    Args:
        change: Sums per prompt, of (runs, prompts).
        scale: What they are relative to, per prompt.
    """
    runs, prompts = change.shape
    total = scale.sum()
    by_run = change.sum(axis=1) / total
    estimate = float(by_run.mean())
    left_out = (change.sum(axis=1, keepdims=True) - change) / (total - scale)
    values = (prompts - 1) * (left_out.mean(axis=1, keepdims=True) - left_out)
    by_prompt = values.mean(axis=0)
    of_runs = of_residual = 0.0
    of_prompts = float((by_prompt**2).sum()) / (prompts * (prompts - 1))
    if runs > 1:
        of_runs = t_quantile(runs - 1) ** 2 * float(by_run.var(ddof=1)) / runs
        residual = float(((values - by_prompt) ** 2).sum()) / ((runs - 1) * (prompts - 1))
        of_residual = residual / values.size
    # The spread is rounding error only: all prompts have the same value.
    if math.sqrt(of_prompts) <= 1e-12 * max(abs(estimate), 1e-300):
        down = up = of_prompts = 0.0
    else:
        down, up = _reach(by_prompt)
    of_prompts = max(of_prompts - of_residual, 0.0)
    low, high = (math.sqrt(of_runs + reach**2 * of_prompts) for reach in (down, up))
    return estimate, estimate - low, estimate + high


def _reach(values: Array) -> tuple[float, float]:
    """How many standard errors an interval reaches below and above the mean of values."""
    count, variance = len(values), float((values**2).mean())
    skewness = float((values**3).mean()) / variance**1.5
    kurtosis = float((values**4).mean()) / variance**2
    freedom = min(count - 1, round(2 * count / (kurtosis - (count - 3) / (count - 1))))
    t, a = t_quantile(max(1, freedom)), skewness / math.sqrt(count)
    # Beyond the cubic's inflection point, at |a| t = 1, one outlier would give an endless interval.
    a = min(max(a, -0.9 / t), 0.9 / t)
    if abs(a) < 1e-6:
        return t, t
    # The inverse of Hall's cubic `y + a y^2 / 3 + a^2 y^3 / 27 + a / 6`.
    below, above = (3 / a * (float(np.cbrt(1 + a * (y - a / 6))) - 1) for y in (t, -t))
    return below, -above


def cohen_kappa(first: Sequence[int], second: Sequence[int]) -> float | None:
    """Agreement of two raters beyond chance (Cohen 1960): 1 is full agreement, 0 is chance.

    `(observed - chance) / (1 - chance)`, with chance from how often each rater uses each category.
    None where it is undefined: without items, and where both raters use one and the same category
    for every item.

    Args:
        first: One category per item.
        second: Categories of the other rater for the same items in the same order.

    Raises:
        ValueError: the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} ratings cannot be compared with {len(second)}")
    count = len(first)
    observed = sum(one == other for one, other in zip(first, second, strict=True))
    counts, others = Counter(first), Counter(second)
    # Integers, so that full agreement by chance is recognised exactly.
    chance = sum(counts[category] * others[category] for category in counts)
    if chance == count**2:
        return None
    return (count * observed - chance) / (count**2 - chance)


@cache
def t_quantile(freedom: int) -> float:
    """97.5% quantile of Student's t, to 1e-6: bisection on its integrated density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)
    # With t = sqrt(freedom) tan(angle), the density is proportional to cos(angle)^(freedom - 1).
    low, high = 0.0, math.pi / 2
    for _ in range(40):
        middle = (low + high) / 2
        angles = np.linspace(0, middle, 2001)
        density = scale * math.sqrt(freedom) * np.cos(angles) ** (freedom - 1)
        steps = middle / 2000
        weights = np.ones(2001)
        weights[1:-1:2], weights[2:-1:2] = 4, 2  # Simpson's rule
        if float((density * weights).sum()) * steps / 3 < 0.475:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)
