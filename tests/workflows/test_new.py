"""`dpo-video new`: a package of every kind that installs and keeps its contract as it is."""

from __future__ import annotations

import runpy
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import Install, Said

from dpo_video import registry
from dpo_video.errors import UserError
from dpo_video.workflows.doctor import doctor
from dpo_video.workflows.new import new_plugin


@pytest.mark.parametrize("kind", registry.KINDS)
def test_a_package_of_every_kind_keeps_its_contract(
    kind: str, install: Install, tmp_path: Path
) -> None:
    folder = new_plugin(kind, "my-own", tmp_path / "package")
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    ((name, value),) = project["project"]["entry-points"][f"dpo_video.{kind}"].items()
    module, _, cls = value.partition(":")
    assert project["tool"]["setuptools"]["py-modules"] == [module]
    install("dpo-video-my-own", (folder / f"{module}.py").read_text(), name, cls, kind)
    assert registry.load(kind, "my-own").__name__ == cls == "MyOwn"
    assert not [each.note for each in registry.listings(kind) if each.note]
    test = runpy.run_path(str(folder / "tests" / f"test_{module}.py"))
    test["test_it_keeps_the_contract"]()
    if kind == "pairs":  # on latents that are strided in time as well
        assert not doctor("dpo-video-my-own", contracts=True).faults
    sys.modules.pop(module)


def test_it_says_what_to_do_next(said: Said) -> None:
    told = said(0, "new", "loss", "my-own")
    assert "pip install -e dpo-video-my-own && pytest dpo-video-my-own" in told
    assert Path("dpo-video-my-own/tests").is_dir()
    assert "exists already" in said(2, "new", "loss", "my-own")


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("losses", "a", "Unknown kind 'losses'. Did you mean 'loss'"),
        ("loss", "My Loss", "cannot name a strategy"),
        ("loss", "class", "cannot name a strategy"),
        ("loss", "../a", "cannot name a strategy"),
        ("loss", "region", "There is a loss 'region' already"),
    ],
)
def test_what_cannot_be_written_is_refused(
    kind: str, name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        new_plugin(kind, name)
    assert not list(tmp_path.iterdir())
