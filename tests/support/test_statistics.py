from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from dpo_video.support.statistics import cohen_kappa, paired_difference, t_quantile

Array = NDArray[np.float64]


def draw(rng: np.random.Generator, pairs: int, *, skewed: bool) -> tuple[Array, Array]:
    """Base values around 150 and differences of mean -30."""
    base = rng.lognormal(5, 0.4, pairs)
    change = -10 - 20 * rng.exponential(1, pairs) if skewed else rng.normal(-30, 40, pairs)
    return base, base + change


TRUTH = -30.0
RELATIVE_TRUTH = TRUTH / math.exp(5 + 0.4**2 / 2)


@pytest.mark.parametrize(("pairs", "skewed"), [(10, False), (47, False), (47, True)])
def test_the_interval_covers_the_truth_as_often_as_it_says(pairs: int, skewed: bool) -> None:
    rng = np.random.default_rng(0)
    trials = 600
    covered = relative = below = above = 0
    for _ in range(trials):
        found = paired_difference(*draw(rng, pairs, skewed=skewed))
        covered += found.low <= TRUTH <= found.high
        below += found.high < TRUTH
        above += found.low > TRUTH
        assert found.relative_low is not None and found.relative_high is not None
        relative += found.relative_low <= RELATIVE_TRUTH <= found.relative_high
    # The standard error of a share of 600 trials near 95% is 0.9%.
    assert 0.92 <= covered / trials <= 0.98
    assert 0.92 <= relative / trials <= 0.98
    # Both sides miss: an interval that is off to one side would be right for the wrong reason.
    assert max(below, above) / trials <= 0.06


def test_no_difference_is_rarely_called_one() -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        base = rng.lognormal(5, 0.4, 47)
        found = paired_difference(base, base * rng.normal(1, 0.2, 47))
        wrong += found.low > 0 or found.high < 0
    assert wrong / 400 <= 0.08


def test_means_by_hand() -> None:
    found = paired_difference([10.0, 20.0, 30.0], [9.0, 16.0, 29.0])
    assert (found.pairs, found.base_mean, found.tuned_mean) == (3, 20.0, 18.0)
    assert found.difference == -2.0
    assert found.relative == -0.1
    assert found.low < -2.0 < found.high


def test_pairing_is_what_makes_it_sharp() -> None:
    rng = np.random.default_rng(2)
    base, tuned = draw(rng, 47, skewed=True)
    paired = paired_difference(base, tuned)
    shuffled = paired_difference(base, rng.permutation(tuned))
    assert shuffled.difference == pytest.approx(paired.difference)
    assert shuffled.high - shuffled.low > 2 * (paired.high - paired.low)


def test_equal_values_give_the_same_interval() -> None:
    base, tuned = draw(np.random.default_rng(3), 20, skewed=True)
    assert paired_difference(base, tuned) == paired_difference(list(base), list(tuned))


def test_a_normal_sample_has_the_interval_of_students_t() -> None:
    """Without skewness and with the kurtosis of few values, nothing is corrected."""
    change = np.array([-3.0, -1.0, -0.5, 0.5, 1.0, 3.0])
    found = paired_difference(np.full(6, 10.0), 8 + change)
    half = 2.570582 * change.std(ddof=1) / 6**0.5  # t of 5 degrees of freedom
    assert (found.low, found.high) == pytest.approx((-2 - half, -2 + half), rel=1e-4)


def test_the_longer_tail_has_the_longer_end() -> None:
    """A rare large gain may be missing from the sample, so that end of the interval is further."""
    base = np.full(24, 10.0)
    change = np.array([-0.1, 0.1] * 11 + [0.0, 3.0])
    found = paired_difference(base, base + change)
    assert found.high - found.difference > 1.5 * (found.difference - found.low)


def test_swapping_the_sides_flips_the_interval() -> None:
    base, tuned = draw(np.random.default_rng(4), 30, skewed=True)
    there, back = paired_difference(base, tuned), paired_difference(tuned, base)
    assert back.difference == -there.difference
    assert back.low == pytest.approx(-there.high)
    assert back.high == pytest.approx(-there.low)


def test_units_scale_the_difference_and_leave_the_relative_change() -> None:
    base, tuned = draw(np.random.default_rng(5), 30, skewed=True)
    one, thousand = paired_difference(base, tuned), paired_difference(1000 * base, 1000 * tuned)
    assert thousand.low == pytest.approx(1000 * one.low)
    assert thousand.relative_low == pytest.approx(one.relative_low)


def test_equal_differences_leave_no_doubt() -> None:
    found = paired_difference([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert (found.low, found.difference, found.high) == (0.5, 0.5, 0.5)
    none = paired_difference([1.0, 2.0], [1.0, 2.0])
    assert (none.low, none.high, none.relative) == (0.0, 0.0, 0.0)


def test_a_base_of_zero_has_no_relative_change() -> None:
    found = paired_difference([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    assert found.difference == 2.0
    assert found.relative is found.relative_low is found.relative_high is None
    # The base's own interval contains 0: then, too, nothing is claimed.
    assert paired_difference([0.0, 0.0, 5.0], [1.0, 2.0, 3.0]).relative is None


def test_what_is_never_negative_cannot_fall_by_more_than_all_of_it() -> None:
    base = [84.0, 75.0, 4.0, 7.0, 4.0, 8.0, 6.0, 5.0]  # two videos decide
    tuned = [5.0, 115.0, 3.0, 3.0, 3.0, 6.0, 5.0, 4.0]
    found = paired_difference(base, tuned)
    assert found.relative_low == -1
    assert found.relative_high is not None and found.relative_high > 0
    signed = paired_difference([*base, 6.0], [*tuned, -0.1])
    assert signed.relative_low is not None and signed.relative_low < -1


def test_a_negative_base_keeps_the_sign_of_the_change() -> None:
    found = paired_difference([-10.0, -20.0, -30.0], [-9.0, -18.0, -29.0])
    assert found.relative is not None and found.relative > 0


def test_pairs_without_a_value_are_left_out_and_counted() -> None:
    found = paired_difference([1.0, math.nan, 3.0, 4.0], [2.0, 9.0, math.inf, 6.0])
    assert (found.pairs, found.base_mean, found.tuned_mean) == (2, 2.5, 4.0)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="3 base values cannot be paired with 2"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite pairs of 2 prompts or more, not 1"):
        paired_difference([1.0, math.nan], [1.0, 2.0])


# --- agreement -------------------------------------------------------------------------------

# Two raters on 50 items: both say 1 on 20 and 0 on 15, and they differ on 5 and 10. They agree on
# 0.7; by chance they would on 25/50 * 30/50 + 25/50 * 20/50 = 0.5. So kappa is 0.2 / 0.5.
FIRST = [1] * 20 + [1] * 5 + [0] * 10 + [0] * 15
SECOND = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15


def test_videos_of_one_prompt_are_one_sample() -> None:
    """Copies of a video add nothing; the interval stays that of the prompts."""
    rng = np.random.default_rng(0)
    base, tuned = draw(rng, 12, skewed=False)
    once = paired_difference(base, tuned)
    names = [str(i // 6) for i in range(72)]
    copied = paired_difference(np.repeat(base, 6), np.repeat(tuned, 6), prompts=names)
    assert (once.prompts, copied.prompts, copied.pairs) == (12, 12, 72)
    assert copied.low == pytest.approx(once.low) and copied.high == pytest.approx(once.high)
    naive = paired_difference(np.repeat(base, 6), np.repeat(tuned, 6))
    assert naive.high - naive.low < 0.5 * (once.high - once.low)


def test_correlated_videos_of_few_prompts_are_rarely_called_a_change() -> None:
    """8 prompts of 6 videos, correlation 0.4 within a prompt: 24% false positives as 48 samples."""
    rng = np.random.default_rng(2)
    names = [str(i // 6) for i in range(48)]
    wrong, naive = 0, 0
    for _ in range(300):
        base = np.full(48, 100.0)
        noise = np.repeat(rng.normal(size=8), 6) * 0.4**0.5 + rng.normal(size=48) * 0.6**0.5
        for count, prompts in enumerate((None, names)):
            found = paired_difference(base, base + noise, prompts=prompts)
            clear = found.low > 0 or found.high < 0
            naive, wrong = naive + clear * (count == 0), wrong + clear * (count == 1)
    assert naive / 300 > 0.15
    assert wrong / 300 <= 0.085  # 5% expected, standard error 1.3%


@pytest.mark.parametrize("runs", [3, 5])
@pytest.mark.parametrize("of_runs", [0.0, 0.3, 1.0])
def test_training_seeds_are_inside_the_interval(runs: int, of_runs: float) -> None:
    """Prompts and runs as crossed random effects: 95% covers at least 93%, and seldom more."""
    rng = np.random.default_rng(3)
    covered, trials = 0, 500
    for _ in range(trials):
        base = np.full(47, 100.0)
        change = of_runs * rng.normal(size=(runs, 1)) + rng.normal(size=47)
        change = change + rng.normal(size=(runs, 47)) - 10
        found = paired_difference(base, base + change)
        assert found.relative_low is not None and found.relative_high is not None
        assert found.low == pytest.approx(100 * found.relative_low)  # the base is constant
        covered += found.low <= -10 <= found.high
    assert 0.93 <= covered / trials <= 0.995


def test_the_quantiles_of_students_t() -> None:
    table = {1: 12.7062, 2: 4.3027, 4: 2.7764, 9: 2.2622, 30: 2.0423, 46: 2.0129}
    assert {n: round(t_quantile(n), 4) for n in table} == table


def test_kappa_of_a_table_counted_by_hand() -> None:
    assert cohen_kappa(FIRST, SECOND) == pytest.approx(0.4)
    assert cohen_kappa(SECOND, FIRST) == pytest.approx(0.4)
    named = {0: 7, 1: -3}
    assert cohen_kappa([named[x] for x in FIRST], [named[x] for x in SECOND]) == pytest.approx(0.4)


def test_kappa_is_1_for_equal_ratings_and_negative_below_chance() -> None:
    assert cohen_kappa(FIRST, FIRST) == 1
    assert cohen_kappa([1, -1, 0], [1, -1, 0]) == 1
    assert cohen_kappa([0, 1], [1, 0]) == -1
    assert cohen_kappa([1, 1], [0, 0]) == 0, "two raters of one category each, and not the same"


@pytest.mark.parametrize("ratings", [[], [1], [0, 0, 0]])
def test_kappa_is_undefined_where_chance_agrees_on_everything(ratings: list[int]) -> None:
    assert cohen_kappa(ratings, ratings) is None
    with pytest.raises(ValueError, match="cannot be compared"):
        cohen_kappa(ratings, [*ratings, 1])


def test_judging_needs_no_torch() -> None:
    code = "import sys, dpo_video.evaluation.results as a, dpo_video.evaluation.report; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
