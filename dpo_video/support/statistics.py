"""Confidence intervals of paired differences, and agreement of raters. NumPy only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Array = NDArray[np.float64]

_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf(0.975)  # two-sided 95%


class Record(BaseModel):
    """Base of stored records: frozen, no unknown fields, and valid JSON even with NaN values."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )


class PairedDifference(Record):
    """The mean of tuned - base over pairs of the same prompt and seed, with 95% intervals."""

    pairs: int
    """Number of pairs with two finite values."""
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
    tuned: Sequence[float] | Array,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Bootstrap the mean paired difference and its size relative to the base.

    Whole pairs are resampled, because base and tuned share their prompt and noise. The intervals
    are BCa (Efron 1987), widened for small samples as a t interval is (Hesterberg 2015, arXiv
    1411.5279, section 5.3). Coverage against the plain percentile interval, in simulations of 1500
    draws: for normal differences 94% instead of 90% at 10 pairs, and 95% for both at 47; for
    exponential ones at 47 pairs 94% instead of 92%, with misses of 3.1% below and 2.8% above
    instead of 6.4% and 1.7%.

    Args:
        base: One value per pair.
        tuned: Values of the same pairs in the same order.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws; the only source of randomness.

    Raises:
        ValueError: the lengths differ, or fewer than 2 pairs are finite.
    """
    if len(base) != len(tuned):
        raise ValueError(f"{len(base)} base values cannot be paired with {len(tuned)} tuned ones")
    both = np.array([base, tuned], dtype=np.float64)
    before, after = both[:, np.isfinite(both).all(axis=0)]
    pairs = len(before)
    if pairs < 2:
        raise ValueError(f"an interval needs 2 finite pairs or more, not {pairs}")
    change = after - before
    picks = np.random.default_rng(seed).integers(pairs, size=(resamples, pairs))
    base_draws, change_draws = before[picks].mean(axis=1), change[picks].mean(axis=1)
    # Jackknife: the same means with one pair left out.
    base_left_out = (before.sum() - before) / (pairs - 1)
    change_left_out = (change.sum() - change) / (pairs - 1)
    base_mean, difference = float(before.mean()), float(change.mean())
    low, high = _interval(difference, change_draws, change_left_out)
    relative = relative_low = relative_high = None
    # A base of 0 in some draw has no relative change, so none is reported.
    if base_mean != 0 and base_draws.all() and base_left_out.all():
        relative = difference / abs(base_mean)
        relative_low, relative_high = _interval(
            relative,
            change_draws / np.abs(base_draws),
            change_left_out / np.abs(base_left_out),
        )
    return PairedDifference(
        pairs=pairs,
        base_mean=base_mean,
        tuned_mean=float(after.mean()),
        difference=difference,
        low=low,
        high=high,
        relative=relative,
        relative_low=relative_low,
        relative_high=relative_high,
    )


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


def _interval(estimate: float, draws: Array, left_out: Array) -> tuple[float, float]:
    """Expanded BCa interval of an estimate, from its bootstrap draws and jackknife values."""
    pull = left_out.mean() - left_out
    spread = float((pull**2).sum())
    # The spread is rounding error only: all pairs have the same value.
    if math.sqrt(spread) <= 1e-12 * max(abs(estimate), 1e-300):
        return estimate, estimate
    acceleration = float((pull**3).sum()) / (6 * spread**1.5)
    below = float((draws < estimate).mean() + (draws == estimate).mean() / 2)
    margin = 0.5 / len(draws)
    bias = _NORMAL.inv_cdf(min(max(below, margin), 1 - margin))
    reach = _t_quantile(len(left_out) - 1) * math.sqrt(len(left_out) / (len(left_out) - 1))
    levels = []
    for z in (bias - reach, bias + reach):
        levels.append(_NORMAL.cdf(bias + z / max(1 - acceleration * z, 1e-6)))
    low, high = np.quantile(draws, levels)
    return float(low), float(high)


def _t_quantile(freedom: int) -> float:
    """97.5% quantile of Student's t (Cornish-Fisher; within 1% from 5 degrees of freedom on)."""
    first = (_Z**3 + _Z) / 4
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    return _Z + first / freedom + second / freedom**2
