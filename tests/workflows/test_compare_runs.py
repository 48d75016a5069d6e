"""Finished runs are compared by their evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_evaluation import an_evaluation

import dpo_video as dv
from dpo_video.errors import UserError
from dpo_video.workflows.config import resolve

PROMPTS = [f"prompt {i}" for i in range(12)]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs with different names, and two that are the training seeds of one entry."""
    folders = [tmp_path / name for name in ("first", "second", "third/seed-0", "third/seed-1")]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        config = resolve(flags={"run.seed": int(folder.name == "seed-1")})
        (folder / "run.toml").write_text(config.toml())
        an_evaluation(PROMPTS, still=number == 1).save(folder / "evaluation")
    return folders


def test_runs_are_rows_and_their_seeds_are_pooled(runs: list[Path], tmp_path: Path) -> None:
    first, second, zero, one = runs
    found = dv.compare([zero, first, second, one], out=tmp_path / "out")
    assert [(row.entry, row.seeds) for row in found.rows] == [
        ("third", (0, 1)),
        ("first", (0,)),
        ("second", (0,)),
    ]
    alone = an_evaluation(PROMPTS, still=True)
    for metric, expected in zip(found["second"].metrics, alone.metrics, strict=True):
        assert metric.difference.relative == expected.difference.relative
    assert found["first"].verdict != found["second"].verdict  # it moves less
    assert (tmp_path / "out" / "index.html").is_file()
    assert not (tmp_path / "out" / "pairs").exists()


def test_thresholds_can_be_changed_and_nothing_else(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    strict = dv.compare(runs[:2], min_prompts=20, out=out)
    assert "needs 20" in strict.rows[0].verdict.headline
    for options, flag in (({"steps": 5}, "--steps"), ({"num_prompts": 4}, "--num-prompts"),
                          ({"only": ["first"]}, "--only"), ({"selection_prompts": 2},
                          "--selection-prompts")):  # fmt: skip
        with pytest.raises(UserError, match=f"leave {flag} out"):
            dv.compare(runs[:2], out=out, **options)  # type: ignore[arg-type]


def test_runs_that_are_not_comparable_are_refused(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    an_evaluation(PROMPTS[:-1]).save(runs[1] / "evaluation")
    with pytest.raises(UserError, match=r"other prompts.*dpo-video evaluate"):
        dv.compare(runs[:2], out=out)
    an_evaluation(PROMPTS, seed=2).save(runs[1] / "evaluation")
    with pytest.raises(UserError, match="or base videos"):
        dv.compare(runs[:2], out=out)
    (runs[1] / "evaluation" / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"has no evaluation\. Evaluate it first"):
        dv.compare(runs[:2], out=out)
    with pytest.raises(UserError, match="Two runs are named 'first'"):
        dv.compare([runs[0], runs[0]], out=out)
    with pytest.raises(UserError, match="is not a run"):
        dv.compare([tmp_path], out=out)
    with pytest.raises(UserError, match="folders of finished runs only"):
        dv.compare([runs[0], runs[0] / "run.toml"], out=out)
    assert not out.exists()
