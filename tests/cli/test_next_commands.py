"""Every command that a command prints as its next step runs as it is printed, on every family."""

from __future__ import annotations

import os
import re
import shlex
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPE, Said
from small_animatediff import save_small_animatediff
from small_cogvideox import OPTIONS as COGVIDEOX
from small_cogvideox import save_small_cogvideox
from small_wan import OPTIONS as WAN
from small_wan import save_small_wan

from dpo_video.cli import display
from dpo_video.data.video_writer import write_video
from dpo_video.testing import small_videos

ANIMATEDIFF = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tiny": (None, {}),
    "animatediff": (save_small_animatediff, ANIMATEDIFF),
    "cogvideox": (save_small_cogvideox, COGVIDEOX),
    "wan": (save_small_wan, WAN),
}
CHEAPER = {  # appended to what is printed: nothing else is
    "train": (
        "--steps=1 --metric=frame_difference --set=train.gradient_accumulation_steps=1 "
        "--set=train.rank=2 --set=train.validation_videos=0 --set=train.report_to=none --device=cpu"
    ),
    "evaluate": "--num-prompts=2 --set=evaluate.num_inference_steps=1",
    "label": "--set=labeler.weights={frame_difference=1} --set=labeler.guards={} "
    "--set=labeler.margin=0 --device=cpu",
    "generate": "--num-inference-steps=1",
}


@dataclass
class Shell:
    """Runs commands, and those that they print."""

    said: Said
    ran: list[str] = field(default_factory=list)

    def __call__(self, code: int, *arguments: str) -> str:
        told = self.said(code, *arguments)
        self.ran.append(arguments[0])
        return told

    def follow(self, told: str, last: str = "") -> None:
        """Run every printed command, and what these print, up to the command `last`."""
        for line in re.findall(r"dpo-video [a-z][^\n]*", told):
            assert not re.search(r"\b[A-Z]{4,}\b", line), f"a placeholder: {line}"
            words = shlex.split(line)[1:]
            cheaper = "" if "--resume" in words else CHEAPER.get(words[0], "")
            said = self(0, *words, *shlex.split(cheaper))
            if words[0] != last:
                self.follow(said, last)


@pytest.fixture
def shell(said: Said) -> Shell:
    return Shell(said)


def building(family: str, folder: Path, kind: str, *more: str) -> list[str]:
    """A command that builds pairs of a small model in `folder`."""
    save, options = FAMILIES[family]
    model = []
    if save is not None:
        save(folder / "model")
        model = ["--set=backbone.model=model"]
    return [
        "build", f"--backbone={family}", *model, f"--pairs={kind}", "--device=cpu", "--count=2",
        "--set=build.previews=false", "--out=my pairs", *more,
        *(f"--set=backbone.{name}={value}" for name, value in options.items()),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "precision"),
    [("tiny", "no"), ("animatediff", "no"), ("cogvideox", "bf16"), ("wan", "bf16")],
)
def test_what_is_printed_after_a_build_leads_to_an_evaluation(
    shell: Shell, tmp_path: Path, family: str, precision: str
) -> None:
    options = [f"--set=train.mixed_precision={precision}", "--set=pairs.num_inference_steps=1"]
    shell.follow(shell(0, *building(family, tmp_path, "jitter", *options)))
    assert shell.ran == ["build", "train", "evaluate"]
    if family == "tiny":
        return
    # Whoever names the family again gets the same; whoever names another one is told of both.
    again = ["train", "--pairs=my pairs/", "--loss=global", *shlex.split(CHEAPER["train"])]
    shell(0, *again, f"--backbone={family}", "--out=again")
    shell(0, "generate", "--pairs=my pairs/", "--prompt=a cat", "--num-inference-steps=1")
    told = shell(2, *again, "--backbone=tiny", "--out=other")
    assert f"They were made with {family} with the model {tmp_path / 'model'}" in told


def test_labels_and_packed_pairs_lead_to_trainings(shell: Shell, tmp_path: Path) -> None:
    size = (ANIMATEDIFF[name] for name in ("frames", "height", "width"))
    for index, video in enumerate(small_videos(2, *size)):
        write_video(tmp_path / "clips" / f"{index}.mp4", video, 8)
    dense = ("--clips=clips", "--prompt=a square", "--set=pairs.num_inference_steps=2")
    told = shell(0, *building("animatediff", tmp_path, "dense", *dense))
    assert "Train on them" not in told
    shell.follow(told[told.rindex("Label them") :], last="train")
    assert shell.ran == ["build", "label", "train"]
    undecided = ["--pairs=my pairs/", "--loss=global", *shlex.split(CHEAPER["train"])]
    told = shell(2, "train", *undecided, "--out=none")
    assert "are ties" in told
    shell.follow(told, last="label")
    told = shell(0, "pack", "my pairs", "packed")
    assert "Label them" in told
    shell.follow(told, last="label")


def test_the_command_that_resumes_a_run_resumes_it(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell(0, *building("animatediff", tmp_path, "jitter", "--set=pairs.num_inference_steps=1"))
    step = display.TerminalProgress.step

    def interrupted(self: display.TerminalProgress, *arguments: Any) -> None:
        step(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    train = ["train", "--pairs=my pairs/", "--loss=global", *shlex.split(CHEAPER["train"])]
    with monkeypatch.context() as patch:
        patch.setattr(display.TerminalProgress, "step", interrupted)
        told = shell(143, *train, "--steps=2", "--out=a run")
    shell.follow(told)
    assert shell.ran == ["build", "train", "train", "evaluate"]


def test_what_check_estimate_and_config_print_runs(shell: Shell, tmp_path: Path) -> None:
    size = (ANIMATEDIFF[name] for name in ("frames", "height", "width"))
    for index, video in enumerate(small_videos(2, *size)):
        write_video(tmp_path / "clips" / f"{index}.mp4", video, 8)
    dense = ("--clips=clips", "--prompt=a square", "--set=pairs.num_inference_steps=2")
    shell(0, *building("animatediff", tmp_path, "dense", *dense))
    printed = []
    for code, command in (
        (1, "check 'my pairs' --metric=frame_difference"),
        (0, "estimate --pairs='my pairs' --loss=global"),
        (0, "config --pairs='my pairs' --loss=global"),
    ):
        told = shell(code, *shlex.split(command))
        printed.append(told + getattr(shell.said, "out", ""))
    assert "dpo-video label" in printed[0]
    for text in printed:
        shell.follow(text, last="label")
    told = shell(1, "check", "my pairs", "--metric=frame_difference") + shell.said.out  # type: ignore[attr-defined]
    assert "dpo-video check 'my pairs' --labels" in told
    shell.follow(told, last="check")
