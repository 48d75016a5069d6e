"""Strategies in a file: they run if they were typed, and never because a file names them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import Said

from dpo_video import registry
from dpo_video.errors import PluginError, UserError
from dpo_video.registry import local
from dpo_video.workflows.config import resolve
from dpo_video.workflows.options import configure

SOURCE = '''
from dpo_video.plugin import (
    Field, Listener, ListenerFactory, Loss, LossOutput, PairErrors, clip_loss
)

__import__("pathlib").Path("ran").touch()

class Mine(Loss):
    """Global DPO."""

    beta: float = Field(default=7.0, gt=0)
    """Slope."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """The loss."""
        return clip_loss(errors, self.beta)

class Broken:
    pass

class Heard(ListenerFactory):
    """Does nothing."""

    loud: bool = False
    """Whether it is loud."""

    def __call__(self) -> Listener:
        """A listener."""
        return Listener()
'''


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of one loss, in the working directory of a process that has allowed nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "_allowed", set())
    for module in [name for name in sys.modules if name.startswith("dpo_video_local_")]:
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path / "mine.py"


def test_a_typed_file_is_used_and_kept_with_its_hash(file: Path) -> None:
    config = configure("train", {"loss": "./mine.py:Mine", "set": ["loss.beta=3"]})
    assert type(config.loss).__name__ == "Mine" and config.tables["loss"]["beta"] == 3.0
    name = config.tables["loss"]["name"]
    assert name.startswith("code/mine-") and name.endswith(".py:Mine")
    again = configure("train", {"loss": str(file) + ":Mine"}).tables["loss"]["name"]
    assert again == name and registry.short_name(name) == "Mine"
    heard = {"listeners": ["./mine.py:Heard"], "set": ["listener.Heard.loud=true"]}
    assert configure("train", heard).tables["listener"] == {
        name.replace("Mine", "Heard"): {"loud": True}
    }
    local.save(name, file.parent / "run")
    file.write_text(SOURCE + "# changed\n")
    assert configure("train", {"loss": "mine.py:Mine"}).tables["loss"]["name"] != name
    assert (file.parent / "run" / name.partition(":")[0]).read_text() == SOURCE


def test_a_file_that_another_file_names_runs_only_with_a_flag(
    file: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = file.parent / "run"
    config = configure("train", {"loss": "mine.py:Mine"})
    local.save(config.tables["loss"]["name"], run)
    (run / "run.toml").write_text(config.toml())
    Path("ran").unlink()
    monkeypatch.setattr(local, "_allowed", set())
    monkeypatch.delitem(sys.modules, type(config.loss).__module__)
    for refused in (
        lambda: resolve(file=run / "run.toml"),
        lambda: configure("train", {"config": run / "run.toml", "set": ["loss.beta=5"]}),
        lambda: resolve(choices={"loss": "mine.py:Mine"}),  # as the entry of a comparison
    ):
        with pytest.raises(UserError, match="is code in a file, which does not run"):
            refused()
    assert "add --allow-code" in said(2, "config", "--config", run / "run.toml")
    resolve(file=run / "run.toml", kinds=("backbone", "metric"))  # to evaluate or export it
    assert not Path("ran").exists()
    repeated = configure("train", {"config": run / "run.toml", "allow_code": True})
    assert repeated.tables["loss"] == config.tables["loss"] and Path("ran").exists()
    (copied,) = run.glob("code/*.py")
    copied.write_text(SOURCE + "# tampered with\n")
    with pytest.raises(UserError, match="does not run"):
        resolve(file=run / "run.toml")


def test_what_is_wrong_with_a_file_is_told(file: Path) -> None:
    for name, sentence in (
        ("none.py:Mine", "cannot be read: No such file"),
        ("mine.py:Yours", "has no class 'Yours'"),
        ("mine.py:Broken", "is not a Loss"),
    ):
        with pytest.raises(UserError, match=sentence):
            configure("train", {"loss": name})
    Path("bad.py").write_text("1 / 0\n")
    with pytest.raises(PluginError, match=r"cannot be imported \(ZeroDivisionError"):
        configure("train", {"loss": "bad.py:Mine"})
    with pytest.raises(UserError, match="dpo-video new backbone NAME"):
        configure("train", {"backbone": "mine.py:Mine"})
