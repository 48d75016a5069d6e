"""`dpo-video bench` starts the suites; no test depends on how long they take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dpo_video
from benchmarks.bench import SUITES, bench
from benchmarks.support.results import read_results
from dpo_video.cli import app
from dpo_video.errors import UserError

pytest.importorskip("pytest_benchmark")


def test_suites_run_in_miniature(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    # One process for all suites: most of the time is spent on imports.
    names = ["loss", "masks", "memory", "metric", "step", "store"]
    # Of the steps, the same ones in other modes are left out.
    selected = (
        "(not memory and not tiny and not copy and not cached) or wan-1.3b-l4-toggle-blocks-j"
    )
    arguments = ["bench", *names, "--tier", "l4", "--quick", "--only", selected]
    arguments += ["--out", str(tmp_path)]
    # In an xdist worker, pytest-benchmark would disable timing and write no report.
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "dpo_video", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = read_results(tmp_path)
    assert sorted(found) == names
    (memory,) = found.pop("memory").groups
    peak = memory.candidates[0].figures["peak, GiB of the card (predicted)"]
    assert memory.name == "wan-1.3b on l4" and 10 < float(peak) < 22
    for suite in found.values():
        assert suite.quick
        for group in suite.groups:
            assert group.of(group.baseline) is not None
            assert len(group.candidates) > 1
            assert all(len(each.seconds) == 1 for each in group.candidates)
    (group,) = found["step"].groups
    split, joint = group.of("toggle, split"), group.of("toggle, joint")
    assert split is not None and split.flops is not None
    assert joint is not None and joint.flops is not None
    assert split.flops > joint.flops  # one more forward pass
    flow = found["metric"].groups[0].of("ours, colour")
    assert flow is not None
    assert float(flow.figures["error on smooth motion, px"]) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steps"], "Unknown suite 'steps'. Did you mean 'step'?"),
        (["loss", "--tier", "t4"], "--tier is for the memory suite"),
        (["loss", "--compare", "a", "b"], "--compare runs no suites"),
        (["--compare", "a", "b"], "'a' cannot be read"),
        (["loss", "--rounds", "0"], "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        bench(arguments)
    assert message in str(refused.value)


def test_the_command_returns_the_exit_code() -> None:
    done = CliRunner().invoke(app, ["bench", "steps"])
    assert done.exit_code == 2


def test_help_names_every_suite() -> None:
    shown = CliRunner().invoke(app, ["bench", "--help"]).output
    assert set(SUITES) == {"step", "memory", "metric", "store", "masks", "loss", "startup"}
    assert all(name in shown for name in SUITES)


def test_without_the_repository_it_names_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages" / "dpo_video" / "__init__.py"
    monkeypatch.setattr(dpo_video, "__file__", str(installed))
    here = Path.cwd()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "loss"])
    assert isinstance(done.exception, UserError)
    assert "Run this command in a clone of the repository" in str(done.exception)
    # In a clone beside an installed package.
    monkeypatch.chdir(here)
    assert CliRunner().invoke(app, ["bench", "nosuch"]).exit_code == 2
