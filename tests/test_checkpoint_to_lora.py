"""The page "From a checkpoint to a LoRA", run as it is written: on folders, and on single files."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from conftest import SHAPE, Said
from small_animatediff import save_small_base, save_small_motion_adapter
from small_single_files import save_motion_module, save_stable_diffusion

from dpo_video.data.video_writer import write_video
from dpo_video.testing import small_videos

PAGE = (Path(__file__).parents[1] / "docs" / "checkpoint_to_lora.md").read_text(encoding="utf-8")
MODELS = re.findall(r"```toml\n# model.toml\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
FILES = ("config", "build", "train", "evaluate", "export")  # on single files
CHEAPER = {  # appended to what is written: nothing else is
    "build": "--count=2 --set=pairs.num_inference_steps=1 --set=build.previews=false --device=cpu",
    "check": "--metric=frame_difference",
    "train": "--steps=1 --metric=frame_difference --set=train.gradient_accumulation_steps=1 "
    "--set=train.rank=2 --set=train.alpha=4 --set=train.validation_videos=0 "
    "--set=train.report_to=none --set=train.learning_rate=0.01 --device=cpu",
    "evaluate": "--num-prompts=2 --set=evaluate.num_inference_steps=1 --device=cpu "
    "--metric=frame_difference",
    "generate": "--num-inference-steps=1",
}


def test_the_page_has_both_kinds_of_model_and_every_command() -> None:
    assert len(MODELS) == 2 and ("safetensors" in MODELS[0], "safetensors" in MODELS[1]) == (0, 1)
    assert {words[0] for words in COMMANDS} >= {
        "config", "estimate", "build", "check", "train", "evaluate", "generate", "export",
    }  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=["folders", "files"])
def test_every_command_of_the_page_runs(said: Said, tmp_path: Path, model: str) -> None:
    save_small_base(tmp_path / "my_model")
    save_small_motion_adapter(tmp_path / "my_motion_adapter")
    if "safetensors" in model:
        save_stable_diffusion(tmp_path / "my_model", tmp_path / "my_model.safetensors")
        save_motion_module(
            tmp_path / "my_motion_adapter", tmp_path / "my_motion_module.safetensors"
        )
        for weights in tmp_path.glob("my_m*/**/*.safetensors"):  # nothing else has them
            weights.unlink()
    size = f"frames = {SHAPE.frames}\nheight = {SHAPE.height}\nwidth = {SHAPE.width}\n"
    Path("model.toml").write_text(f"{model}{size}")
    for index, video in enumerate(small_videos(2, SHAPE.frames, SHAPE.height, SHAPE.width)):
        write_video(tmp_path / "my_videos" / f"{index}.mp4", video, 8.0)
        (tmp_path / "my_videos" / f"{index}.txt").write_text("a red square moving left slowly")
    folders = "safetensors" not in model
    # What a model is read from is the same after the first command of a name.
    first_of = {words[0]: words for words in reversed(COMMANDS)}
    commands = COMMANDS if folders else [first_of[each] for each in FILES]
    for words in commands:
        code = 1 if words[0] == "check" else 0  # two pairs are a problem, and it is the last one
        said(code, *words, *shlex.split(CHEAPER.get(words[0], "")))
    if not folders:
        return
    for video in ("first.mp4", "lora.mp4"):
        assert Path(video).stat().st_size > 0
    second = tomllib.loads(Path("runs/second/run.toml").read_text())["train"]
    first = json.loads(
        Path("runs/first/checkpoints/step_000001/adapter/adapter_config.json").read_text()
    )
    assert second["rank"] == first["r"] and second["init_from"] == str(tmp_path / "my_lora")
