"""How often the 95% intervals of an evaluation cover the truth, by simulation.

    OMP_NUM_THREADS=1 python -m benchmarks.coverage

Evaluations are drawn whose true change is known, and each case says how its prompts, the videos of
a prompt and the training seeds vary. A 95% interval should cover 93 to 97%.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_video.support.statistics import paired_difference

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, Any], Array]

RESULTS = Path(__file__).parent / "results" / "0.1.0" / "coverage.json"
TRUTH = -0.2
"""The true change, relative to the base's mean."""
GOAL = (0.93, 0.97)

# Distributions with mean 0 and, except for the heavy tails, variance 1.
DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy tails": lambda rng, size: rng.standard_t(3, size=size),
    "skewed": lambda rng, size: rng.exponential(1, size) - 1,
    "very skewed": lambda rng, size: (
        (rng.lognormal(0, 1, size) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """How the differences of an evaluation vary."""

    prompts: int
    videos: int = 1
    """Videos of each prompt."""
    correlation: float = 0.0
    """Correlation of the videos of a prompt."""
    seeds: int = 1
    """Training seeds."""
    spread: float = 0.0
    """Standard deviation of the training seeds, relative to that of the prompts."""
    distribution: str = "normal"
    """Distribution of the prompts' effects."""
    proportional: bool = False
    """Whether an effect is proportional to the base's value, as of a training that removes a share
    of the flicker; otherwise it is independent of it."""
    base_spread: float = 0.3
    """Standard deviation of the logarithm of the base's values."""


CASES = [
    *(Case(prompts=n, distribution=name) for name in DISTRIBUTIONS for n in (8, 16, 24, 47)),
    *(
        Case(prompts=n, distribution=name, proportional=True, base_spread=spread)
        for spread in (0.3, 0.6)
        for name in ("normal", "skewed")
        for n in (8, 24, 47)
    ),
    *(Case(prompts=8, videos=6, correlation=share) for share in (0.2, 0.4)),
    *(
        Case(prompts=24, videos=4, correlation=0.4, distribution=name)
        for name in ("normal", "skewed")
    ),
    *(
        Case(prompts=47, seeds=seeds, spread=spread, distribution=name)
        for name in ("normal", "skewed")
        for seeds in (2, 3, 5)
        for spread in (0.0, 0.3, 1.0)
    ),
]


def coverage(case: Case, trials: int) -> dict[str, Any]:
    """Share of trials in which the absolute and the relative interval cover the truth."""
    rng = np.random.default_rng(0)
    names = [f"prompt {i // case.videos}" for i in range(case.prompts * case.videos)]
    mean = float(np.exp(case.base_spread**2 / 2))
    covered: dict[str, list[bool]] = {"absolute": [], "relative": []}
    above: list[bool] = []
    for _ in range(trials):
        base, change = _draw(rng, case)
        found = paired_difference(base, base + change, prompts=names)
        low, high = found.relative_low, found.relative_high
        assert low is not None and high is not None
        covered["absolute"].append(found.low <= TRUTH * mean <= found.high)
        covered["relative"].append(low <= TRUTH <= high)
        above.append(low > TRUTH)
    shares = {name: sum(hits) / trials for name, hits in covered.items()}
    # Misses on one side only would be a bias.
    return {
        **asdict(case),
        "trials": trials,
        **shares,
        "relative_misses_above": sum(above) / trials,
        "reached": all(GOAL[0] <= share <= GOAL[1] for share in shares.values()),
    }


def _draw(rng: np.random.Generator, case: Case) -> tuple[Array, Array]:
    """The base's values, one per video, and the differences, of (seeds, videos)."""
    videos, draw = case.prompts * case.videos, DISTRIBUTIONS[case.distribution]

    def of_prompts(values: Array) -> Array:
        return np.repeat(values, case.videos)

    base = of_prompts(np.exp(case.base_spread * rng.normal(size=case.prompts)))
    effect = of_prompts(draw(rng, case.prompts))
    if case.videos > 1:
        own = rng.normal(size=videos)
        effect = effect * case.correlation**0.5 + own * (1 - case.correlation) ** 0.5
    effects = effect + case.spread * rng.normal(size=(case.seeds, 1))
    if case.seeds > 1:
        effects = effects + rng.normal(size=(case.seeds, videos))
    scale = base if case.proportional else np.exp(case.base_spread**2 / 2)
    return base, scale * (TRUTH - TRUTH * effects)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate every case, print it, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    rows = []
    for case in CASES:
        rows.append(coverage(case, given.trials))
        print(rows[-1], flush=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
