"""An evaluation draws batch by batch, resumes to the same bytes and shares the base's videos."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SHAPE
from torch import Tensor

import dpo_video as dv
from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.build import Worker
from dpo_video.evaluation.results import Evaluation
from dpo_video.workflows import evaluate

PROMPTS = ("a red square", "a blue circle", "a green star")
OPTIONS: dict[str, Any] = {
    "num_inference_steps": 1, "metrics": ["frame_difference"], "device": "cpu",
}  # fmt: skip


class Killed(BaseException):
    """Stands for a signal that nothing handles."""


@pytest.fixture(scope="module")
def run(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dv.Run:
    root = tmp_path_factory.mktemp("streaming")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    size = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
    backbone = dv.backbone.AnimateDiff(model=str(small_folder), **size)
    AcceleratorState._reset_state(reset_partial_state=True)
    return dv.train(
        "jitter", backbone=backbone, prompt=PROMPTS[0], count=1, loss="global", out=root / "run",
        set={"pairs.num_inference_steps": 1, "evaluate.prompts": str(root / "prompts.txt")},
        steps=2, save_steps=1, gradient_accumulation_steps=1, learning_rate=0.1, rank=2,
        validation_videos=0, report_to="none", mixed_precision="no", device="cpu",
    )  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of the batches that were decoded; a number appended first kills that many later."""
    batches: list[int] = []
    decode = AnimateDiffModel.decode_videos

    def counted(self: AnimateDiffModel, latents: Tensor) -> Tensor:
        batches.append(len(latents))
        return decode(self, latents)

    monkeypatch.setattr(AnimateDiffModel, "decode_videos", counted)
    yield batches


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def test_an_evaluation_that_was_killed_twice_ends_in_the_same_bytes(
    run: dv.Run, drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run.evaluate(out=tmp_path / "whole", command="mine", **OPTIONS)
    assert drawn == [1] * 6  # base and tuned
    for path in run.folder.glob("base-*/*"):
        path.unlink()
    drawn.clear()
    count = AnimateDiffModel.decode_videos
    for last in (2, 5):

        def killed(self: AnimateDiffModel, latents: Tensor, last: int = last) -> Tensor:
            if len(drawn) == last:
                raise Killed
            return count(self, latents)

        monkeypatch.setattr(AnimateDiffModel, "decode_videos", killed)
        with pytest.raises(Killed):
            run.evaluate(out=tmp_path / "killed", command="mine", **OPTIONS)
    monkeypatch.setattr(AnimateDiffModel, "decode_videos", count)
    # A video without its record, as a kill between the two leaves it, and a torn one.
    (tmp_path / "killed" / "videos" / "000-tuned.json").unlink()
    again = run.evaluate(out=tmp_path / "killed", command="mine", **OPTIONS)
    assert again.to_json() == whole.to_json() and drawn == [1] * 7
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    (tmp_path / "killed" / "videos" / "001-tuned.mp4").write_bytes(b"torn")
    run.evaluate(out=tmp_path / "killed", command="mine", **OPTIONS)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and drawn == [1] * 8


def test_the_checkpoints_of_a_run_share_the_videos_of_the_base(
    run: dv.Run, drawn: list[int], tmp_path: Path
) -> None:
    first = run.evaluate(checkpoint=1, out=tmp_path / "1", **OPTIONS)
    drawn.clear()
    last = run.evaluate(out=tmp_path / "2", **OPTIONS)
    assert drawn in ([1] * 3, [])  # the tuned ones, unless another test drew them
    assert first.metrics[0].base == last.metrics[0].base
    assert first.metrics[0].tuned != last.metrics[0].tuned
    # Other metrics are measured on the videos that are drawn again; the first ones are kept.
    drawn.clear()
    both = ["frame_difference", "sharpness"]
    more = run.evaluate(out=tmp_path / "2", **{**OPTIONS, "metrics": both})
    assert drawn == [1] * 6 and more.metrics[0] == last.metrics[0]
    drawn.clear()
    assert run.evaluate(out=tmp_path / "2", **OPTIONS).metrics == last.metrics and not drawn


def test_processes_share_the_videos(
    run: dv.Run, drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run.evaluate(out=tmp_path / "alone", command="mine", seed=50, **OPTIONS)
    for path in run.folder.glob("base-*/*"):
        path.unlink()
    drawn.clear()

    def part(number: int) -> Evaluation:
        monkeypatch.setattr(evaluate, "launched_worker", lambda: Worker(number=number, count=2))
        return run.evaluate(out=tmp_path / "two", command="mine", seed=50, **OPTIONS)

    other = multiprocessing.get_context("fork").Process(target=part, args=(1,))
    other.start()
    found = part(0)
    other.join()
    assert other.exitcode == 0 and drawn == [1] * 4  # the other one has drawn two
    assert found.to_json() == alone.to_json()
    assert contents(tmp_path / "two") == contents(tmp_path / "alone")


def test_the_memory_does_not_grow_with_the_number_of_videos(
    run: dv.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most bytes of videos and latents that are alive when a video is decoded."""
    decode, alive = AnimateDiffModel.decode_videos, list[int]()

    def counted(self: AnimateDiffModel, latents: Tensor) -> Tensor:
        gc.collect()
        own = {id(p) for p in (*self.denoiser.parameters(), *self.vae.parameters())}
        tensors = [t for t in gc.get_objects() if type(t) is Tensor and id(t) not in own]
        alive.append(sum(t.untyped_storage().nbytes() for t in tensors if t.ndim >= 4))
        return decode(self, latents)

    monkeypatch.setattr(AnimateDiffModel, "decode_videos", counted)
    run.evaluate(out=tmp_path / "few", **OPTIONS)
    few = max(alive)
    alive.clear()
    run.evaluate(out=tmp_path / "many", seed=100, num_videos_per_prompt=4, **OPTIONS)
    assert len(alive) == 24 and max(alive) <= few
    assert torch.is_grad_enabled()
