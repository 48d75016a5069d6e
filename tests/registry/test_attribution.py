"""A plugin that fails while it runs is named, keeps its traceback and breaks nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, Install, load_small

from dpo_video import registry
from dpo_video.cli import main
from dpo_video.data.segments import check_labels
from dpo_video.errors import PluginError, UserError
from dpo_video.evaluation.evaluate import measure
from dpo_video.labeler.vlm import VLM
from dpo_video.loss.global_ import Global
from dpo_video.metric.frame_difference import FrameDifference
from dpo_video.registry.attribution import attribution, plugin_of
from dpo_video.settings import EvaluateSettings, TrainSettings
from dpo_video.testing import random_errors
from dpo_video.training.checkpoint import check_manifest
from dpo_video.training.lora import adapt
from dpo_video.training.run_dir import latest_checkpoint
from dpo_video.types import Prompt
from dpo_video.workflows.config import resolve

FAULTY = '''
import sys
from typing import ClassVar
from dpo_video import strategies
from dpo_video.loss.global_ import Global

class Late(strategies.Loss):
    """Fails after the first step."""

    def __call__(self, errors):
        output = Global()(errors)
        if output.margin.detach().any():
            raise KeyError("late")
        return output

class Leaver(strategies.Loss):
    """Exits the program with code 0."""

    def __call__(self, errors):
        sys.exit(0)

class Mean(strategies.Loss):
    """Returns one loss for all pairs."""

    def __call__(self, errors):
        return Global()(errors).loss.mean()

class Blind(strategies.Metric):
    """Fails on every video."""

    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = ""

    def __call__(self, videos, prompts):
        return {}[prompts[0]]

class Void(Blind):
    """Returns NaN."""

    def __call__(self, videos, prompts):
        return videos.mean(dim=(1, 2, 3, 4)) * float("nan")

class Short(Blind):
    """Returns no values."""

    def __call__(self, videos, prompts):
        return videos.mean(dim=(1, 2, 3, 4))[:0]
'''
Faulty = Callable[[str, str], type]


@pytest.fixture
def faulty(install: Install) -> Faulty:
    """Installs one of the classes above as a strategy, under its name in lower case."""

    def add(kind: str, cls: str) -> type:
        install(f"dpo-{cls.lower()}", FAULTY, cls.lower(), cls, kind)
        return registry.load(kind, cls.lower())

    return add


def raised(call: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        call()
    return caught.value


def test_a_failing_loss_ends_the_run_and_keeps_its_checkpoint(
    faulty: Faulty,
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    faulty("loss", "Late")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "dpo-video",
            "train",
            "--backbone=animatediff",
            f"--set=backbone.model={small_folder}",
            f"--set=backbone.frames={SHAPE.frames}",
            f"--set=backbone.height={SHAPE.height}",
            f"--set=backbone.width={SHAPE.width}",
            "--device=cpu",
            "--pairs=jitter",
            "--set=pairs.num_inference_steps=2",
            "--loss=late",
            "--metric=frame_difference",
            "--count=1",
            "--steps=9",
            "--set=train.gradient_accumulation_steps=1",
            "--set=train.rank=2",
            "--set=train.validation_videos=0",
            "--set=train.save_steps=1",
            "--set=train.report_to=none",
            f"--out={tmp_path / 'run'}",
        ],
    )
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        main()
    told = capfd.readouterr().err
    assert stop.value.code == 1
    sentence = "Error: The loss 'late' of dpo-late 1.0 failed (KeyError: 'late'). "
    assert told.index(sentence) < told.index("Traceback")
    assert 'raise KeyError("late")' in told and "dpo_late.py" in told
    saved = latest_checkpoint(tmp_path / "run")
    check_manifest(saved)
    assert saved.name >= "step_000001"


def test_a_metric_that_fails_is_left_out_and_the_others_are_reported(
    faulty: Faulty, small_folder: Path, tmp_path: Path
) -> None:
    adapt(load_small(small_folder), TrainSettings(rank=2), 0).save_pretrained(tmp_path / "adapter")
    broken = {name.lower(): faulty("metric", name)() for name in ("Blind", "Void", "Short")}
    settings = EvaluateSettings(num_inference_steps=1)
    comparison = measure(
        load_small(small_folder),
        tmp_path / "adapter",
        {**broken, "frame_difference": FrameDifference()},
        [Prompt(text="a", seed=0), Prompt(text="b", seed=1)],
        settings,
        tmp_path / "videos",
    )
    assert [result.name for result in comparison.metrics] == ["frame_difference"]
    reasons = {metric.name: metric.reason for metric in comparison.left_out}
    assert "'blind' of dpo-blind 1.0 failed (KeyError: 'a')" in reasons["blind"]
    assert "'short' of dpo-short 1.0 returns values, a value that" in reasons["short"]
    assert "'void' is left out: it is nan for the base model's video of 'a'" in reasons["void"]

    class Ours(FrameDifference.__base__):  # type: ignore[misc, name-defined]
        """A metric without an entry point."""

        def __call__(self, videos: object, prompts: object) -> object:
            raise ArithmeticError

    ours = Ours.model_construct()
    with pytest.raises(ArithmeticError):  # a bug of a built-in metric is raised
        measure(
            load_small(small_folder),
            tmp_path / "adapter",
            {"ours": ours},
            [Prompt(text="a")],
            settings,
            tmp_path / "one",
        )
    with pytest.raises(KeyError):  # no metric is left
        measure(
            load_small(small_folder),
            tmp_path / "adapter",
            broken,
            [Prompt(text="a")],
            settings,
            tmp_path / "none",
        )


def test_the_error_is_attributed_to_the_innermost_plugin(faulty: Faulty) -> None:
    errors = random_errors()
    leaver = faulty("loss", "Leaver")()
    told = attribution(raised(lambda: leaver(errors)))
    assert told is not None and told.startswith("The loss 'leaver' of dpo-leaver 1.0 failed (Syst")
    assert plugin_of(leaver) is not None and plugin_of(Global()) is None
    assert attribution(raised(lambda: Global()(None))) is None  # type: ignore[arg-type]
    assert attribution(raised(lambda: sys.exit(0))) is None


def test_a_loss_of_one_number_for_all_pairs_is_refused(faulty: Faulty) -> None:
    from dpo_video.training.objective import loss_of

    with pytest.raises(PluginError, match=r"loss 'mean' of dpo-mean 1\.0 returns a Tensor"):
        loss_of(faulty("loss", "Mean")(), random_errors())
    assert loss_of(Global(), random_errors()).loss.shape == torch.Size([3])


@pytest.mark.parametrize("labels", [torch.ones(2), torch.ones(1, 3), torch.full((1, 2), 2.0),
                                    torch.full((1, 2), torch.nan)])  # fmt: skip
def test_labels_outside_the_contract_are_refused(labels: torch.Tensor) -> None:
    labeler = VLM(model="none")
    assert check_labels(labeler, torch.tensor([[1.0, -0.5]]), 2).tolist() == [[1.0, -0.5]]
    with pytest.raises(
        UserError, match=r"labeler VLM of .* returns labels of 2 segments, a value that"
    ):
        check_labels(labeler, labels, 2)


def test_options_that_toml_cannot_hold_are_refused(install: Install) -> None:
    source = FAULTY.replace("class Mean(strategies.Loss):\n", "class Mean(strategies.Loss):\n"
                            "    levels: list[int | None] = [None]\n")  # fmt: skip
    install("dpo-holes", source, "holes", "Mean")
    with pytest.raises(
        UserError, match=r"options of Mean in dpo_holes cannot be written to a run.toml"
    ):
        resolve(choices={"loss": "holes"})
