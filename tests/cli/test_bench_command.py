"""`dpo-video bench` runs its suites; how long they take is nobody's business here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dpo_video
from benchmarks.support.results import read_results
from dpo_video.cli import app
from dpo_video.cli.bench import benchmarks
from dpo_video.errors import UserError

pytest.importorskip("pytest_benchmark")


def test_suites_run_in_miniature(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    # One process for all: what takes long is importing.
    names = ["loss", "masks", "metric", "step", "store"]
    picked = "not tiny and not copy and not cached"  # the same step by other roads
    arguments = ["bench", *names, "--quick", "--only", picked, "--out", str(tmp_path)]
    # Beside other workers of xdist, pytest-benchmark would not time, and write no report.
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "dpo_video", *arguments],
        env=alone, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = read_results(tmp_path)
    assert sorted(found) == names
    for suite in found.values():
        assert suite.quick
        for race in suite.races:
            assert race.of(race.yardstick) is not None
            assert len(race.contestants) > 1
            assert all(len(each.seconds) == 1 for each in race.contestants)
    (race,) = found["step"].races
    split, joint = race.of("toggle, split"), race.of("toggle, joint")
    assert split is not None and split.flops is not None
    assert joint is not None and joint.flops is not None
    assert split.flops > joint.flops  # one more forward pass
    lk = found["metric"].races[0].of("ours, colour")
    assert lk is not None
    assert float(lk.figures["error on smooth motion, px"]) < 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["steps"], "Unknown suite 'steps'. Did you mean 'step'?"),
        (["loss", "--tier", "t4"], "--tier is for the memory suite"),
        (["loss", "--compare", "a", "b"], "--compare runs nothing"),
        (["--compare", "a", "b"], "'a' cannot be read"),
    ],
)
def test_a_wrong_command_says_what_to_do(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)


def test_every_suite_that_help_names_is_there() -> None:
    said = CliRunner().invoke(app, ["bench", "--help"]).output
    timed = {path.stem.removeprefix("bench_") for path in benchmarks().glob("bench_*.py")}
    assert timed == {"step", "metric", "store", "masks", "loss", "startup"}
    assert all(name in said for name in timed | {"memory"})
    for script in ("memory.py", "fit_check.py"):  # the memory suite, without and with --tier
        assert (benchmarks() / script).is_file()


def test_without_the_repository_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "dpo_video" / "__init__.py"
    monkeypatch.setattr(dpo_video, "__file__", str(installed))
    done = CliRunner().invoke(app, ["bench", "loss"])
    assert isinstance(done.exception, UserError)
    assert "Clone it" in str(done.exception)
