"""`dpo-video export`: its files, its card and its errors."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors import safe_open
from small_wan import OPTIONS, save_small_wan

from dpo_video.cli import main

EXPORT = ["export", "--device=cpu"]


@dataclass(frozen=True, kw_only=True)
class Done:
    code: int
    err: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run of two steps in bf16, evaluated."""
    folder = tmp_path_factory.mktemp("export")
    save_small_wan(folder / "wan")
    model = ["--backbone=wan", f"--set=backbone.model={folder / 'wan'}", "--device=cpu"]
    model += [f"--set=backbone.{name}={value}" for name, value in OPTIONS.items()]
    quick = ["rank=2", "alpha=6", "gradient_accumulation_steps=1", "save_steps=1",
             "validation_videos=0", "learning_rate=0.1", "mixed_precision=bf16",
             "report_to=none", "warmup_steps=0"]  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        for command in (
            [
                "train",
                "--pairs=jitter",
                "--loss=global",
                "--count=2",
                "--steps=2",
                *model,
                "--set=pairs.num_inference_steps=1",
                "--metric=frame_difference",
                "--out",
                str(folder / "run"),
                *(f"--set=train.{option}" for option in quick),
            ],
            [
                "evaluate",
                str(folder / "run"),
                "--num-prompts=2",
                "--set=evaluate.num_inference_steps=1",
            ],
        ):
            patch.setattr(sys, "argv", ["dpo-video", *command])
            with pytest.raises(SystemExit) as stop:
                main()
            assert not stop.value.code
    AcceleratorState._reset_state(reset_partial_state=True)
    yield folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["dpo-video", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit) as stop:
            main()
        return Done(code=int(stop.value.code or 0), err=capfd.readouterr().err)

    return command


def test_each_card_shows_how_to_load_its_format(run: Run, trained: Path, tmp_path: Path) -> None:
    words = {
        "diffusers": "pipe.load_lora_weights(",
        "peft": "PeftModel.from_pretrained(pipe.transformer,",
        "comfyui": "LoraLoaderModelOnly",
        "merged": "--set backbone.model=FOLDER",
    }
    for format, word in words.items():
        done = run(*EXPORT, trained / "run", f"--format={format}", "--out", tmp_path / format)
        assert done.code == 0, done.err
        assert "Loaded back and compared" in done.err
        card = (tmp_path / format / "README.md").read_text()
        assert word in card
    with safe_open(tmp_path / "comfyui" / "run.safetensors", framework="pt") as file:
        assert "diffusion_model.blocks.1.cross_attn.o.lora_B.weight" in list(file.keys())
    done = run("generate", "--config", trained / "run" / "run.toml", "--device=cpu",
               f"--set=backbone.model={tmp_path / 'merged'}", "--num-inference-steps=1",
               "--prompt=a red square", "--out", tmp_path / "video.gif")  # fmt: skip
    assert done.code == 0, done.err


def test_the_card_describes_the_run(run: Run, trained: Path) -> None:
    done = run(*EXPORT, trained / "run", "--checkpoint=1")
    assert done.code == 0, done.err
    card = (trained / "run" / "export" / "diffusers-1" / "README.md").read_text()
    for line in (
        "| pairs | 2 jitter |",
        "| labels | those stored with the pairs |",
        "| loss | global (beta 2500.0, sft_weight 0.0) |",
        "| reference | toggle |",
        "| LoRA | rank 2, alpha 6 |",
        "| learning rate | 0.1 |",
        "| steps | 1 of 2, 1 pair each |",
        "| seed | 0 |",
        "| precision | bf16 |",
        "State: **too early** at step 1.",
        "the same prompts and seeds (measured on another checkpoint, step_000002).",
        "whose licence applies. Name that licence here",
    ):
        assert line in card, line
    assert re.search(r"\| frame difference \| lower \| [\d.]+ \| [\d.]+ \| .+ to .+ \|", card)
    assert re.search(r"\| versions \| dpo-video [\d.]+, torch ", card)
    (settings,) = re.findall(r"```toml\n(.*?)```", card, re.DOTALL)
    tables = tomllib.loads(settings)
    assert tables["train"]["alpha"] == 6 and tables["loss"]["name"] == "global"
    assert tables["backbone"]["model"] == "wan"  # local paths are not published
    head = card.split("---\n")[1]
    assert "pipeline_tag: text-to-video" in head and "base_model" not in head
    (script,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "torch_dtype=torch.bfloat16" in script
    assert 'AutoencoderKLWan.from_pretrained("' in script  # in fp32, as the run had it


def test_any_checkpoint_can_be_evaluated_generated_and_exported(run: Run, trained: Path) -> None:
    folder, whole = (
        trained / "twice",
        ["--device=cpu", "--num-prompts=2", "--set=evaluate.num_inference_steps=1"],
    )
    shutil.copytree(trained / "run", folder)
    assert run("evaluate", folder, "--checkpoint=1", *whole).code == 0
    found = json.loads((folder / "evaluation-1" / "evaluation.json").read_text())
    assert found["facts"]["Checkpoint"] == "step_000001"
    assert found["command"].startswith("dpo-video evaluate ")
    assert found["command"].endswith(
        "--checkpoint=1 --device=cpu --num-prompts=2 --set=evaluate.num_inference_steps=1"
    )
    last = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    tuned = {metric["name"]: metric["tuned"] for metric in last["metrics"]}
    assert any(metric["tuned"] != tuned[metric["name"]] for metric in found["metrics"])
    assert run(*EXPORT, folder, "--checkpoint=1", "--out", trained / "of 1").code == 0
    card = (trained / "of 1" / "README.md").read_text()
    assert "on 2 videos each, with the same prompts and seeds." in card

    videos = []
    for step in ("1", "2"):
        out = trained / f"{step}.gif"
        done = run("generate", folder, f"--checkpoint={step}", "--device=cpu",
                   "--num-inference-steps=1", "--prompt=a red square", "--out", out)  # fmt: skip
        assert done.code == 0, done.err
        videos.append(out.read_bytes())
    assert videos[0] != videos[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "'nowhere' is not a run: it has no run.toml."),
        (["run", "--checkpoint=7"], "has no checkpoint of step 7. It has those of 1, 2."),
        (["run", "--out=wan"], "'wan' exists already."),
    ],
)
def test_a_user_error_is_one_sentence(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(trained)
    done = run(*EXPORT, *arguments)
    assert done.code == 2 and done.err.count("\n") == 1
    assert sentence in done.err
