"""`dpo-video new`: a package of every kind that installs and keeps its contract as it is."""

from __future__ import annotations

import runpy
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import Install, Said

import dpo_video as dv
from dpo_video import registry
from dpo_video.errors import UserError
from dpo_video.registry import entry_points
from dpo_video.workflows.doctor import doctor
from dpo_video.workflows.new import new_plugin


@pytest.mark.parametrize("kind", registry.PYTHON)
def test_a_package_of_every_kind_keeps_its_contract(
    kind: str, install: Install, tmp_path: Path
) -> None:
    folder = new_plugin(kind, "MyOwn", tmp_path / "package")
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    ((name, value),) = project["project"]["entry-points"][f"dpo_video.{kind}"].items()
    module, _, cls = value.partition(":")
    assert project["tool"]["setuptools"]["py-modules"] == [module]
    install("dpo-video-myown", (folder / f"{module}.py").read_text(), name, cls, kind)
    loaded = registry.imported(registry.find(kind, "MyOwn"))
    assert loaded.__name__ == cls == "MyOwn"
    assert not [each.note for each in registry.listings(kind) if each.note]
    test = runpy.run_path(str(folder / "tests" / f"test_{module}.py"))
    test["test_it_keeps_the_contract"]()
    if kind == "pairs":  # on latents that are strided in time as well
        assert not doctor("dpo-video-myown", contracts=True).faults
    sys.modules.pop(module)


STRIDED = """
from itertools import repeat
from dpo_video.plugin import Backbone
from dpo_video.testing import StridedModel
from dpo_video.testing.inputs import random_clip

class Strided(Backbone):
    "The strided model of dpo_video.testing."

    guards = ()

    def load(self, placement):
        return StridedModel()

    def clips(self, seed):
        return repeat(random_clip(StridedModel()))

    def prompts(self, n):
        return [f"prompt {number}" for number in range(n)]
"""
RUN: dict[str, Any] = {
    "count": 1, "steps": 1, "rank": 2, "gradient_accumulation_steps": 1, "validation_videos": 0,
    "report_to": "none", "device": "cpu", "previews": False,
}  # fmt: skip


@pytest.mark.usefixtures("quick_metrics")
def test_packages_of_all_kinds_mix_and_a_run_outlives_them(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in registry.KINDS:
        name = f"my-{kind}"
        module = new_plugin(kind, name, tmp_path / "packages" / kind) / f"dpo_video_my_{kind}.py"
        install(f"dpo-video-{name}", module.read_text(), name, f"My{kind.capitalize()}", kind)
    install("dpo-strided", STRIDED, "strided", "Strided", "backbone")
    assert not doctor().faults
    mine: dict[str, Any] = {
        **{kind: f"my-{kind}" for kind in ("loss", "reference", "timesteps", "optimizer",
                                           "schedule")},
        "listeners": ["my-listener"], "metrics": ["my-metric"], **RUN,
    }  # fmt: skip

    runs = [dv.train("my-pairs", backbone="tiny", out="runs/tiny", **mine)]
    pairs = dv.build_pairs("my-pairs", backbone="strided", count=2, device="cpu", out="pairs")
    assert dv.label(pairs, "my-labeler", device="cpu").labelled == 2
    runs.append(dv.train(pairs, out="runs/strided", **mine))
    runs.append(dv.train("jitter", backbone="my-backbone", out="runs/mine", **mine))
    evaluation = dv.evaluate(runs[1], num_prompts=2, num_inference_steps=1)
    assert [metric.name for metric in evaluation.metrics] == ["my-metric"]
    assert dv.check(pairs, checks=["+my-check"], sample=0).findings[-1].check == "my-check"
    assert dv.export(runs[0], "my-format", set={"format.prefix": "a"}).format == "my-format"
    versions = pairs.manifest.versions
    assert {"dpo-video-my-pairs", "dpo-strided"} <= versions.keys()

    for kind in set(registry.KINDS) - {"backbone"}:
        (tmp_path / f"dpo_video_my_{kind}.py").unlink()
        shutil.rmtree(tmp_path / f"dpo_video_my_{kind}-1.0.dist-info")
        del sys.modules[f"dpo_video_my_{kind}"]
    entry_points.forget()
    assert dv.export(runs[0], "peft").folder.is_dir()
    for run in runs[1:]:
        dv.generate(run, prompt="a", num_inference_steps=1, out=f"{run.folder}.mp4")
    for module in ("dpo_video_my_backbone", "dpo_strided"):
        del sys.modules[module]


def test_it_says_what_to_do_next(said: Said) -> None:
    told = said(0, "new", "loss", "my-own")
    assert "pip install -e dpo-video-my-own && pytest dpo-video-my-own" in told
    assert Path("dpo-video-my-own/tests").is_dir()
    assert "exists already" in said(2, "new", "loss", "my-own")
    Path("file").touch()
    assert "Cannot write to" in said(2, "new", "loss", "my-own", "--out", "file/package")


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("losses", "a", "Unknown kind 'losses'. Did you mean 'loss'"),
        ("loss", "My Loss", "cannot name a strategy"),
        ("loss", "class", "cannot name a strategy"),
        ("loss", "../a", "cannot name a strategy"),
        ("loss", "region", "There is a loss 'region' already"),
        ("command", "bench", "There is a command 'bench' already"),
    ],
)
def test_what_cannot_be_written_is_refused(
    kind: str, name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        new_plugin(kind, name)
    assert not list(tmp_path.iterdir())
