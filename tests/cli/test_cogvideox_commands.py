"""CogVideoX from the command line: build, check, train, evaluate, generate."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_cogvideox import OPTIONS, Layout, save_small_cogvideox

from dpo_video.cli import main
from dpo_video.data.video_writer import write_video
from dpo_video.testing import small_videos
from dpo_video.training.run_dir import latest_checkpoint


@pytest.mark.parametrize(
    ("layout", "pairs", "loss", "reference"),
    [
        ("2b", ["local"], "region", "toggle"),
        ("1.5", ["img2img", "--set=pairs.chosen=clip", "--set=pairs.strength=0.5"], "global",
         "cached"),
    ],
    ids=["2b", "1.5"],
)  # fmt: skip
def test_from_clips_to_videos(
    layout: Layout,
    pairs: list[str],
    loss: str,
    reference: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_small_cogvideox(tmp_path / "cogvideox", layout)
    for i, video in enumerate(small_videos(2, 9, 16, 32)):
        write_video(tmp_path / "clips" / f"clip_{i}.mp4", video, OPTIONS["fps"])
        (tmp_path / "clips" / f"clip_{i}.txt").write_text("a red square moving left slowly")
    model = ["--backbone=cogvideox", "--set=backbone.model=cogvideox", "--device=cpu"]
    model += [f"--set=backbone.{name}={value}" for name, value in OPTIONS.items()]

    def dpo_video(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["dpo-video", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, capfd.readouterr().err

    kind, *options = pairs
    dpo_video(
        "build",
        f"--pairs={kind}",
        *options,
        "--set=pairs.num_inference_steps=4",
        "--count=2",
        "--clips=clips",
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
    assert len(list(Path("run/samples").rglob("*.mp4"))) == 1
    resolved = tomllib.loads(Path("run/run.toml").read_text())["train"]
    assert (resolved["rank"], resolved["alpha"], resolved["betas"]) == (2, 4, [0.9, 0.95])
    weights = load_file(latest_checkpoint(Path("run")) / "adapter/adapter_model.safetensors")
    assert any(weight.any() for name, weight in weights.items() if ".lora_B" in name)
    dpo_video("evaluate", "run", "--num-prompts=2", "--set=evaluate.num_inference_steps=2")
    assert Path("run/evaluation/evaluation.json").exists()
    dpo_video(
        "generate", "run", "--prompt=a blue star", "--num-inference-steps=2", "--out=star.mp4"
    )
    assert Path("star.mp4").stat().st_size > 0


def test_a_wrong_shape_is_one_sentence_and_exit_code_2(
    small_cogvideox: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--backbone=cogvideox", f"--set=backbone.model={small_cogvideox}", "--device=cpu"]
    monkeypatch.setattr(
        sys, "argv", ["dpo-video", "generate", *arguments, "--set=backbone.frames=16"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    said = capfd.readouterr().err
    assert stop.value.code == 2 and "8k + 1 frames, not of 16. Take 17" in said
    assert "Traceback" not in said
