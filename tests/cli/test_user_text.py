"""User text that is hostile to terminals and shells, through the commands that print it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import SHAPE, Said

FOLDER = '[/b] [red] it\'s\n"x" -y'


def shell_words(text: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


def commands(told: str) -> list[list[str]]:
    """The commands at the end of lines, as a shell reads them."""
    return [shell_words(text) for text in re.findall(r"(?m)dpo-video .*$", told)]


def test_folders_and_prompts_of_any_name_pass_through_all_commands(
    said: Said, small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    small = [
        "--backbone=animatediff", f"--set=backbone.model={small_folder}", "--device=cpu",
        f"--set=backbone.frames={SHAPE.frames}", f"--set=backbone.height={SHAPE.height}",
        f"--set=backbone.width={SHAPE.width}",
    ]  # fmt: skip
    quick = [
        "--loss=global", "--steps=1", "--set=train.gradient_accumulation_steps=1",
        "--set=train.validation_videos=0", "--set=train.report_to=none", "--set=train.rank=2",
    ]  # fmt: skip
    build = ["--pairs=jitter", "--set=pairs.num_inference_steps=1", "--count=1", *small]
    pairs, run, packed = f"-p {FOLDER}", f"-r {FOLDER}", f"k {FOLDER}"
    prompt = f"a sign that says {FOLDER}"

    told = said(0, "build", *build, f"--prompt={prompt}", "--out", pairs)
    assert commands(told)[-1] == [
        "dpo-video", "train", "--pairs", f"./{pairs}/", "--loss", "global"
    ]  # fmt: skip
    told = said(0, "pack", f"./{pairs}", packed)
    assert commands(told)[-1] == [
        "dpo-video", "train", "--pairs", f"{packed}/", "--loss", "global"
    ]  # fmt: skip
    told = said(0, "train", "--pairs", f"./{pairs}/", *small, *quick, "--out", run)
    assert commands(told)[-1] == ["dpo-video", "evaluate", f"./{run}"]
    told = said(0, "generate", f"./{run}", f"--prompt={prompt}", "--num-inference-steps=1")
    assert "a sign that says [/b] [red] it's" in told and "\x1b" not in told
    assert "[/b] [red]" in said(0, "export", f"./{run}")
    told = said(2, "train", "--pairs=jitter", *small, *quick, f"--out={run}")
    assert "holds a run already" in told and "[/b] [red]" in told
    told = said(2, "evaluate", f"./no {FOLDER}")
    assert "[/b] [red]" in told
    # typer's own messages
    assert "'[/b]'" in said(2, "[/b]")
