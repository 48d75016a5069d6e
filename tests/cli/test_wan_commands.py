"""Wan from the command line: build, check, train, evaluate, generate."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from small_wan import OPTIONS, save_small_wan

from dpo_video.cli import main
from dpo_video.data.video_writer import write_video
from dpo_video.testing import small_videos
from dpo_video.training.run_dir import latest_checkpoint


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    frames, height, width = (OPTIONS[name] for name in ("frames", "height", "width"))
    for i, video in enumerate(small_videos(2, frames, height, width)):
        write_video(folder / f"clip_{i}.mp4", video, OPTIONS["fps"])
        (folder / f"clip_{i}.txt").write_text("a red square moving left slowly")
    return folder


@pytest.fixture
def a_process_of_its_own() -> Iterator[None]:
    """Accelerate keeps the precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("a_process_of_its_own")
@pytest.mark.parametrize(
    ("layout", "pairs", "loss", "reference", "precision"),
    [
        ({}, "local", "region", "toggle", "bf16"),
        ({"boundary_ratio": 0.8}, "jitter", "global", "copy", "no"),
    ],
    ids=["2.1", "a14b"],
)
def test_from_clips_to_videos(
    layout: dict[str, Any],
    pairs: str,
    loss: str,
    reference: str,
    precision: str,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_small_wan(tmp_path / "wan", **layout)
    model = ["--backbone=wan", "--set=backbone.model=wan", "--device=cpu"]
    model += [f"--set=backbone.{name}={value}" for name, value in OPTIONS.items()]
    model += [f"--set=train.mixed_precision={precision}"]

    def dpo_video(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["dpo-video", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, capfd.readouterr().err

    dpo_video(
        "build",
        f"--pairs={pairs}",
        "--set=pairs.num_inference_steps=4",
        "--count=2",
        f"--clips={clips}",
        "--out=pairs",
        *model,
    )
    dpo_video("check", "pairs/")
    dpo_video(
        "train", "--pairs=pairs/", f"--loss={loss}", f"--reference={reference}", "--steps=2",
        "--out=run", "--metric=frame_difference", "--set=train.gradient_accumulation_steps=1",
        "--set=train.validation_videos=1", "--set=train.report_to=none", "--set=train.rank=2",
        "--set=train.learning_rate=0.01", *model,
    )  # fmt: skip
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert lines[0]["margin"] == 0 and lines[1]["margin"] != 0
    resolved = tomllib.loads(Path("run/run.toml").read_text())["train"]
    assert (resolved["rank"], resolved["alpha"], resolved["weight_decay"]) == (2, 4, 1e-3)
    weights = load_file(latest_checkpoint(Path("run")) / "adapter/adapter_model.safetensors")
    assert any(weight.any() for name, weight in weights.items() if ".lora_B" in name)
    dpo_video("evaluate", "run", "--num-prompts=2", "--set=evaluate.num_inference_steps=2")
    assert Path("run/evaluation/evaluation.json").exists()
    dpo_video(
        "generate", "run", "--prompt=a blue star", "--num-inference-steps=2", "--out=star.mp4"
    )
    assert Path("star.mp4").stat().st_size > 0
