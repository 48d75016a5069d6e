"""The study's choice of learning rates, and its answers, on changes that are known."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
from small_evaluation import an_evaluation

from benchmarks.study import analysis
from dpo_video.errors import UserError
from dpo_video.evaluation.results import Evaluation
from dpo_video.evaluation.verdict import MetricResult, Role

PROMPTS = tuple(f"prompt {i}" for i in range(20))
ROLES = {
    analysis.TARGET: Role.TARGET,
    analysis.MOTION: Role.MOTION,
    analysis.GUARD: Role.GUARD,
}


def evaluated(seed: int, **change: float) -> Evaluation:
    """An evaluation whose metrics change by these shares, and by noise of 1% per prompt."""
    rng = np.random.default_rng(seed)
    base = np.linspace(8, 12, len(PROMPTS))
    metrics = tuple(
        MetricResult.measured(
            name,
            base.tolist(),
            (base * (1 + change.get(name, 0.0)) + rng.normal(0, 0.1, len(base))).tolist(),
            unit="",
            higher_is_better=role is not Role.TARGET,
            role=role,
        )
        for name, role in ROLES.items()
    )
    return an_evaluation(list(PROMPTS)).model_copy(update={"metrics": metrics})


def test_the_lowest_error_among_those_that_keep_motion_and_caption_is_chosen() -> None:
    def changes(error: float, motion: float, guard: float) -> dict[str, float]:
        return {analysis.TARGET: error, analysis.MOTION: motion, analysis.GUARD: guard}

    assert analysis.chosen_rates({
        "local-region-1e-4": changes(-0.1, 0.0, 0.0),
        "local-region-3e-4": changes(-0.3, -0.02, -0.03),
        "local-region-1e-3": changes(-0.5, -0.04, 0.0),
        "sft-1e-4": changes(-0.1, -0.05, 0.0),
        "sft-3e-4": changes(-0.5, 0.0, -0.20),
    }) == {"local-region": "3e-4", "sft": "1e-4"}  # fmt: skip


def test_the_report_has_the_chosen_rates_and_half_the_steps_of_two() -> None:
    selection = tomllib.loads((analysis.HERE / "selection.toml").read_text())
    methods = {analysis._split(entry)[0] for entry in selection}
    report = tomllib.loads(analysis.report_entries(dict.fromkeys(sorted(methods), "3e-4")))
    assert report.keys() == methods | {f"{name}-20" for name in analysis.HALF}
    assert all(table["seeds"] == [0, 1, 2, 3, 4] for table in report.values())
    assert all("train.learning_rate=3e-4" in table["set"] for table in report.values())
    assert "train.steps=20" in report["local-region-20"]["set"]
    assert "train.steps=40" in report["local-region"]["set"]
    asked = {name for each in analysis.QUESTIONS.values() for _, *pair in each for name in pair}
    assert asked <= report.keys()


def test_planted_differences_are_read_and_absent_ones_are_not() -> None:
    error, motion = analysis.TARGET, analysis.MOTION
    planted = {
        "ranked-global": {error: -0.3, motion: -0.1},
        "ranked-sft": {error: -0.2},
        "jitter-sdpo": {error: -0.2},
        "sft": {error: -0.2},
        "local-region": {error: -0.1},
        "dense-segment": {motion: 0.0},
        "dense-global": {motion: 0.0},
        "local-region-20": {error: -0.1},
        "local-global-20": {error: 0.0},
        "local-global": {error: -0.1},
    }
    found = {
        name: {seed: analysis.values_of(evaluated(1000 * i + seed, **change)) for seed in range(5)}
        for i, (name, change) in enumerate(planted.items())
    }
    rows = analysis.answers(found)
    assert [row["reading"] for row in rows] == [
        "ranked-global lower than ranked-sft",
        "no difference shown",
        "local-region higher than sft",
        "dense-segment higher than ranked-global",
        "no difference shown",
        "local-region-20 lower than local-global-20",
        "no difference shown",
    ]
    assert rows[0]["difference"]["mean"] == pytest.approx(-0.1, abs=0.01)
    assert len(analysis.text(rows).splitlines()) == 2 + len(rows)
    with pytest.raises(UserError, match="The entry 'sft' is missing"):
        analysis.answers({name: each for name, each in found.items() if name != "sft"})
    with pytest.raises(UserError, match="different training seeds"):
        analysis.difference(found["sft"], {0: found["ranked-sft"][0]}, error)
    others = {
        seed: {**values, error: ([2.0 * x for x in values[error][0] if x], values[error][1])}
        for seed, values in found["sft"].items()
    }
    with pytest.raises(UserError, match="not evaluated on the same base videos"):
        analysis.difference(found["sft"], others, error)
    with pytest.raises(UserError, match="2 training seeds or more, not 1"):
        analysis.difference({0: found["sft"][0]}, {0: found["ranked-sft"][0]}, error)


def test_the_interval_is_student_s_t_over_the_replicates() -> None:
    # Mean 3, standard deviation sqrt(2.5), t(4) = 2.776445.
    result = analysis.summary({seed: seed + 1.0 for seed in range(5)})
    half = 2.776445 * (2.5 / 5) ** 0.5
    assert result["mean"] == 3
    assert result["low"] == pytest.approx(3 - half, abs=1e-5)
    assert result["high"] == pytest.approx(3 + half, abs=1e-5)


def test_prompts_without_a_value_are_left_out_on_both_sides() -> None:
    found = evaluated(0, warp_error=0.5)
    metric = found[analysis.TARGET]
    holed = MetricResult.measured(
        metric.name,
        [math.nan, *metric.base[1:]],
        list(metric.tuned),
        unit="",
        higher_is_better=False,
        role=Role.TARGET,
    )
    found = found.model_copy(update={"metrics": (holed,)})
    values = analysis.values_of(found)
    of_the_mean = sum(metric.tuned[1:]) / sum(metric.base[1:]) - 1
    change = analysis.relative_change(values, analysis.TARGET + analysis.OF_THE_MEAN)
    assert change == pytest.approx(of_the_mean, rel=1e-5)
    ratios = [after / before for before, after in zip(metric.base, metric.tuned, strict=True)][1:]
    geometric = math.prod(ratios) ** (1 / len(ratios)) - 1
    assert analysis.relative_change(values, analysis.TARGET) == pytest.approx(geometric, rel=1e-5)


def test_cells_are_read_from_the_folder_of_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No evaluations in"):
        analysis.cells([tmp_path])
    folders = [tmp_path / "report-0", tmp_path / "report-1"]
    for seed, folder in enumerate(folders):
        evaluated(seed).save(folder / "sft" / f"seed-{seed}" / "evaluation")
    read = analysis.cells(folders)
    assert list(read["sft"]) == [0, 1]
    file = tmp_path / "values.json"
    file.write_text(analysis.values_text(read))
    kept = analysis.cells([file])
    for seed, values in read["sft"].items():
        assert values.keys() == kept["sft"][seed].keys()
        for metric in values:
            change = analysis.relative_change(values, metric)
            assert change == analysis.relative_change(kept["sft"][seed], metric)
    with pytest.raises(UserError, match="Two evaluations of seed 0 of 'sft'"):
        analysis.cells([*folders, folders[0]])
