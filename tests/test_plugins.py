"""Plugins as strangers write them: really installed, really used, and harmless when broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SHAPE, Said

from dpo_video.data.video_writer import write_video
from dpo_video.registry import entry_points as entries
from dpo_video.testing import small_videos

PLUGINS = Path(__file__).parents[1] / "plugins"
NAMES = sorted(path.parent.name for path in PLUGINS.glob("*/pyproject.toml"))


# Runs several commands in one process, and prints what each of them said.
IN_TURN = """
import contextlib, io, json, sys
from dpo_video.cli import main
found = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["dpo-video", *command]
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    found.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
print(json.dumps(found))
"""


def program(
    *arguments: str | Path, path: Path, cwd: Path, module: str = "dpo_video", code: str = ""
) -> subprocess.CompletedProcess[str]:
    how = ["-c", code] if code else ["-m", module]
    return subprocess.run(
        [sys.executable, *how, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that every plugin of this repository is installed in, by pip, without a network."""
    place = tmp_path_factory.mktemp("plugins")
    sources = []
    for name in NAMES:  # a build leaves things behind: not in the repository
        sources.append(shutil.copytree(PLUGINS / name, place / "sources" / name))
    done = program(
        "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "--target", place / "site", *sources,
        path=place, cwd=place, module="pip",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return place / "site"


@pytest.fixture
def on_path(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """They are installed for this process too."""
    monkeypatch.syspath_prepend(installed)
    entries.forget()
    yield
    entries.forget()


def test_there_is_one_of_every_kind_that_is_mixed_in_a_run() -> None:
    projects = [tomllib.loads((PLUGINS / name / "pyproject.toml").read_text()) for name in NAMES]
    groups = [group for each in projects for group in each["project"]["entry-points"]]
    kinds = ("backbone", "labeler", "loss", "metric", "pairs", "reference")
    assert sorted(groups) == sorted(f"dpo_video.{kind}" for kind in kinds)


def test_it_is_listed_and_shown_like_our_own(installed: Path, tmp_path: Path) -> None:
    commands = json.dumps([["list", "loss"], ["show", "loss", "focal"]])
    done = program(commands, path=installed, cwd=tmp_path, code=IN_TURN)
    listed, shown = (each["out"] for each in json.loads(done.stdout))
    rows = {line.split()[1]: line for line in listed.splitlines()[1:]}
    assert "dpo-video-focal 0.1.0" in rows["focal"] and "region" in rows
    for text in ("arXiv 2501.06645", "loss.beta", "loss.gamma", "0 is the loss `global`"):
        assert text in shown


@pytest.mark.usefixtures("on_path")
def test_it_trains(small_folder: Path, tmp_path: Path, said: Said) -> None:
    said(
        0,
        "train",
        "--pairs=jitter",
        "--loss=focal",
        "--set=loss.gamma=0.3",
        "--set=pairs.num_inference_steps=2",
        "--backbone=animatediff",
        f"--set=backbone.model={small_folder}",
        f"--set=backbone.frames={SHAPE.frames}",
        f"--set=backbone.height={SHAPE.height}",
        f"--set=backbone.width={SHAPE.width}",
        "--count=1",
        "--steps=1",
        "--device=cpu",
        "--set=train.gradient_accumulation_steps=1",
        "--set=train.rank=2",
        "--metric=frame_difference",
        "--out",
        tmp_path / "run",
    )
    assert 'name = "focal"\nbeta = 2500.0\ngamma = 0.3' in (tmp_path / "run/run.toml").read_text()
    # At its first step a policy equals its reference: the loss is 0.5^0.3 ln 2.
    assert '"loss":0.563' in (tmp_path / "run" / "log.jsonl").read_text()
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))  # TensorBoard, by default


@pytest.mark.usefixtures("on_path")
def test_plugins_of_three_kinds_mix(small_folder: Path, tmp_path: Path, said: Said) -> None:
    for i, video in enumerate(small_videos(2, SHAPE.frames, SHAPE.height, SHAPE.width)):
        write_video(tmp_path / "clips" / f"{i}.mp4", video, SHAPE.fps)
    run = tmp_path / "run"
    said(
        0, "train", "--pairs=shuffle", "--set=pairs.frames=3", "--loss=focal",
        "--metric=wavelet_flicker", "--metric=frame_difference", "--backbone=animatediff",
        f"--set=backbone.model={small_folder}", f"--set=backbone.frames={SHAPE.frames}",
        f"--set=backbone.height={SHAPE.height}", f"--set=backbone.width={SHAPE.width}",
        "--clips", tmp_path / "clips", "--prompt=a texture", "--count=2", "--steps=1",
        "--device=cpu", "--set=train.gradient_accumulation_steps=1", "--set=train.rank=2",
        "--set=train.validation_videos=0", "--set=train.report_to=none", "--out", run,
    )  # fmt: skip
    (store,) = (tmp_path / "pairs").glob("shuffle-animatediff-*")
    rows = (store / "pairs.jsonl").read_text().splitlines()
    assert [json.loads(row)["region_share"] for row in rows] == [0.75, 0.75]
    said(0, "evaluate", run, "--num-prompts=2", "--set=evaluate.num_inference_steps=2")
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())
    metrics = {metric["name"]: metric for metric in found["metrics"]}
    assert metrics.keys() == {"wavelet_flicker", "frame_difference"}
    assert all(value > 0 for value in metrics["wavelet_flicker"]["tuned"])


def test_their_own_tests_pass(installed: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    own = [shutil.copytree(PLUGINS / name / "tests", tmp_path / name) for name in NAMES]
    filters = (pytestconfig.getoption("pythonwarnings") or ["error"])[-1]
    done = program(
        "-v", "-W", filters, "-p", "no:cacheprovider", "--import-mode=importlib", *own,
        path=installed, cwd=tmp_path, module="pytest",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert all(f"{name}/" in done.stdout for name in NAMES)


def fake(place: Path, distribution: str, source: str, entry: str) -> None:
    """What pip would leave of a package of one module."""
    module = distribution.replace("-", "_")
    (place / f"{module}.py").write_text(source)
    info = place / f"{module}-3.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 3.2\n")
    (info / "entry_points.txt").write_text(f"[dpo_video.loss]\n{entry}\n")


def test_broken_plugins_are_named_and_break_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "site"
    place.mkdir()
    fake(place, "dpo-absent", "import nothing_like_this\n", "absent = dpo_absent:Absent")
    fake(place, "dpo-plain", "class Plain:\n    pass\n", "plain = dpo_plain:Plain")
    fake(place, "dpo-double", "raise SystemExit\n", "region = dpo_double:Region")
    names = ("absent", "plain", "dpo-double:region", "region")
    commands = [["list", "loss"], *(["show", "loss", name] for name in names)]
    done = program(json.dumps(commands), path=place, cwd=tmp_path, code=IN_TURN)
    assert done.returncode == 0, done.stderr
    listed, *shown = json.loads(done.stdout)
    assert listed["code"] == 0 and listed["err"] == ""
    rows = [line.split()[1] for line in listed["out"].splitlines()[1:]]
    assert {"absent", "plain", "global"} <= set(rows) and rows.count("region") == 2
    reasons = (
        ("dpo-absent 3.2", "No module named 'nothing_like_this'"),
        ("dpo-plain 3.2", "is not a Loss"),
        ("dpo-double 3.2", "SystemExit"),
    )
    *broken, ours = shown
    for (package, why), told in zip(reasons, broken, strict=True):
        assert told["code"] == 2 and told["out"] == ""
        assert package in told["err"] and why in told["err"]
        assert told["err"].count("\n") == 1 and "Traceback" not in told["err"]
    assert ours["code"] == 0
