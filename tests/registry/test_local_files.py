"""Strategies in a file: they run if they were typed, and never because a file names them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from conftest import Said

import dpo_video as dv
from dpo_video import registry
from dpo_video.data.pack import pack
from dpo_video.data.store import PairStore
from dpo_video.errors import PluginError, UserError
from dpo_video.evaluation.measuring import Meters
from dpo_video.evaluation.results import Evaluation
from dpo_video.loss.global_ import Global
from dpo_video.registry import local
from dpo_video.registry.attribution import attribution, made_by
from dpo_video.registry.returned import called
from dpo_video.strategies import Placement
from dpo_video.workflows.config import resolve
from dpo_video.workflows.options import configure
from dpo_video.workflows.session import check_pairs

SOURCE = '''
from collections.abc import Sequence
from typing import ClassVar, Literal

from dpo_video.backbone import Tiny
from dpo_video.plugin import (
    Field, Listener, ListenerFactory, Loss, LossOutput, Metric, PairErrors, PerPair, Videos,
    clip_loss,
)

__import__("pathlib").Path("ran").touch()

class Mine(Loss):
    """Global DPO."""

    beta: float = Field(default=7.0, gt=0)
    """Slope."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """The loss."""
        return clip_loss(errors, self.beta)

    def fail(self) -> None:
        raise ValueError("no")

class Broken:
    pass

number = 1

def leave():
    raise SystemExit(0)

class Misplaced(Metric):
    """A role that does not exist."""

    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = ""
    role: ClassVar[str] = "gard"

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """Nothing."""
        return videos.mean((1, 2, 3, 4))

class Brightness(Metric):
    """Mean brightness."""

    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = ""
    role: ClassVar[Literal["guard"]] = "guard"
    scale: float = 1.0
    """Factor."""

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """Mean of all values."""
        return videos.mean((1, 2, 3, 4)) * self.scale

class Small(Tiny):
    """The embedded model."""

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
    local.save(config.tables, file.parent / "run")
    file.write_text(SOURCE + "# changed\n")
    assert configure("train", {"loss": "mine.py:Mine"}).tables["loss"]["name"] != name
    assert (file.parent / "run" / name.partition(":")[0]).read_text() == SOURCE


def test_a_printed_configuration_names_the_files_themselves(file: Path, said: Said) -> None:
    given = ("config", "--loss", "./mine.py:Mine", "--metric", "+mine.py:Brightness")
    said(0, *given, "--json")
    tables = json.loads(said.out)
    assert tables["loss"]["name"] == f"{file}:Mine"
    assert f"{file}:Brightness" in tables["metric"]
    Path("elsewhere").mkdir()
    Path("elsewhere/mine.toml").write_text(tomli_w.dumps(tables))
    again = configure("train", {"config": Path("elsewhere/mine.toml"), "allow_code": True})
    assert type(again.loss).__name__ == "Mine" and again.tables["loss"]["name"].startswith("code/")


def test_a_file_that_another_file_names_runs_only_with_a_flag(
    file: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = file.parent / "run"
    config = configure("train", {"loss": "mine.py:Mine", "metrics": ["+mine.py:Brightness"]})
    local.save(config.tables, run)
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
    evaluated = resolve(file=run / "run.toml", kinds=("backbone", "metric"))
    assert "warp_error" in evaluated.metrics and "Brightness" not in evaluated.metrics
    assert "Brightness' is code in a file" in " ".join(evaluated.notes)
    assert not Path("ran").exists()
    repeated = configure("train", {"config": run / "run.toml", "allow_code": True})
    assert repeated.tables["loss"] == config.tables["loss"] and Path("ran").exists()
    (copied,) = run.glob("code/*.py")
    copied.write_text(SOURCE + "# tampered with\n")
    with pytest.raises(UserError, match="does not run"):
        resolve(file=run / "run.toml")


def test_options_hold_for_the_same_class_named_again(file: Path) -> None:
    Path("c.toml").write_text('[loss]\nname = "./mine.py:Mine"\nbeta = 3.0\n')
    given = {"config": Path("c.toml"), "loss": str(file) + ":Mine"}
    assert configure("train", given).tables["loss"]["beta"] == 3
    file.write_text(SOURCE + "# corrected\n")
    assert configure("train", given).tables["loss"]["beta"] == 3
    run = file.parent / "run"
    metric = "mine.py:Brightness"
    config = configure("train", {"metrics": [f"+{metric}"], "set": ["metric.Brightness.scale=2"]})
    local.save(config.tables, run)
    (run / "run.toml").write_text(config.toml())
    again = configure("evaluate", {"config": run / "run.toml", "metrics": [f"+{metric}"]})
    (table,) = [table for name, table in again.tables["metric"].items() if "Brightness" in name]
    assert table == {"scale": 2.0} and "warp_error" in again.metrics


def test_a_class_of_a_file_is_shown(file: Path, said: Said) -> None:
    said(0, "show", "metric", "mine.py:Brightness")
    assert "metric.Brightness.scale" in said.out  # type: ignore[attr-defined]


def test_an_error_of_a_file_is_told_of_that_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = configure("train", {"loss": "./mine.py:Mine"}).loss
    metric = configure("evaluate", {"metrics": ["./mine.py:Brightness"]}).metrics["Brightness"]
    name, source = made_by(loss) or ("", "")
    assert name == "mine.py" and source.startswith("(source ")
    with pytest.raises(ValueError, match="no") as raised:
        loss.fail()  # type: ignore[attr-defined]
    sentence = attribution(raised.value) or ""
    assert sentence.startswith("The loss 'Mine' of mine.py failed (ValueError: no). ")
    assert sentence.endswith("Correct the file; nothing that was saved is lost.")
    assert called(metric) == "The metric 'Brightness' of mine.py"
    with pytest.raises(SystemExit) as left:
        sys.modules[type(loss).__module__].leave()
    assert "of mine.py failed (SystemExit: 0)" in (attribution(left.value) or "")
    monkeypatch.setattr(type(metric), "__call__", lambda *_: 1 / 0)
    _, failed = Meters.of({"Brightness": metric}).measure(torch.zeros(1, 3, 2, 8, 8), ["a"])
    assert "of mine.py failed (ZeroDivisionError" in " ".join(failed.values())


def test_metrics_without_a_target_are_refused_before_anything_is_drawn(file: Path) -> None:
    with pytest.raises(UserError, match="none of them has the role of a target"):
        dv.evaluate(base=file, tuned=file, metrics=["sharpness", "mine.py:Brightness"])


def test_what_is_wrong_with_a_file_is_told(file: Path) -> None:
    for name, sentence in (
        ("none.py:Mine", "cannot be read: No such file"),
        ("mine.py:Yours", "has no class 'Yours'"),
        ("mine.py:Broken", "is not a Loss"),
        ("mine.py:number", "is not a Loss"),
        ("mine.py", "is a file. Name the class in it, too"),
        ("mine.py:Mine+0.1*sft", "a loss in a file cannot be part of a sum"),
        ("sft+0.1*mine.py:Mine", "a loss in a file cannot be part of a sum"),
    ):
        with pytest.raises(UserError, match=sentence):
            configure("train", {"loss": name})
    Path("bad.py").write_text("1 / 0\n")
    with pytest.raises(PluginError, match=r"cannot be imported \(ZeroDivisionError"):
        configure("train", {"loss": "bad.py:Mine"})
    with pytest.raises(UserError, match=r"is a class. Pass an object of it: Global\(\)"):
        configure("train", {"loss": Global})
    with pytest.raises(PluginError, match="has the role 'gard'"):
        configure("evaluate", {"metrics": ["mine.py:Misplaced"]})
    Path("other.py").write_text(SOURCE)
    with pytest.raises(UserError, match="Two of the metrics are named 'Brightness'"):
        configure("evaluate", {"metrics": ["mine.py:Brightness", "./other.py:Brightness"]})


def test_a_backbone_and_a_metric_in_a_file_are_kept_with_the_run_and_its_pairs(
    file: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget() -> None:
        monkeypatch.setattr(local, "_allowed", set())
        for module in [name for name in sys.modules if name.startswith("dpo_video_local_")]:
            monkeypatch.delitem(sys.modules, module)

    few = ("--set", "pairs.num_inference_steps=2", "--set", "evaluate.num_inference_steps=2")
    said(
        0, "train", "--backbone", "mine.py:Small", "--metric", "+mine.py:Brightness", "--out",
        "run", "--count", "2", "--steps", "1", *few, "--set", "train.batch_size=1", "--set",
        "train.gradient_accumulation_steps=1", "--set", "train.validation_videos=0", "--set",
        "metric.Brightness.scale=100",
    )  # fmt: skip
    Path("elsewhere").mkdir()
    file.rename("elsewhere/mine.py")
    forget()
    assert "add --allow-code" in said(2, "evaluate", "run")
    forget()
    out = said(0, "evaluate", "run", "--allow-code", "--num-prompts", "2")
    assert "Brightness" in out
    assert Evaluation.load(Path("run/evaluation"))["Brightness"].base[0] > 1  # scaled
    forget()
    said(0, "export", "run", "--allow-code")
    assert "Small" in (next(Path("run/export").iterdir()) / "README.md").read_text()
    (pairs,) = [path.parent for path in Path().rglob("store.json")]
    forget()
    with pytest.raises(UserError, match="add --allow-code"):
        configure("train", {}, pairs)
    kept = configure("train", {"allow_code": True}, pairs)
    forget()
    typed = configure("train", {"backbone": "elsewhere/mine.py:Small"}, pairs)
    made_with = PairStore(pairs).manifest.recipe["backbone"]
    assert kept.tables["backbone"] == typed.tables["backbone"] == made_with
    model = typed.backbone.load(Placement())
    check_pairs(typed, PairStore(pairs), model)
    list(pack(PairStore(pairs), Path("packed")))
    assert [path.name for path in Path("packed/code").iterdir()] == [
        path.name for path in (pairs / "code").iterdir()
    ]
