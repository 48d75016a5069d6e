"""`generate`: a named file for every prompt of a list, each drawn once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_animatediff import SHAPE, load_small

import dpo_video as dv
from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.clips import open_clips
from dpo_video.data.prompts import load_prompts
from dpo_video.errors import UserError
from dpo_video.settings import TrainSettings
from dpo_video.training.lora import adapt
from dpo_video.types import Prompt

LIST = (
    '{"prompt": "A dog, running!"}\n{"prompt": "a cat", "seed": 7, "negative_prompt": "blur"}\n'
    '{"prompt": "\\u732b"}\n'
)
NAMES = ["000-a-dog-running-seed0.mp4", "001-a-cat-seed7.mp4", "002-猫-seed2.mp4"]


@pytest.fixture
def model(small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    Path("list.jsonl").write_text(LIST)
    size = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
    backbone = dv.backbone.AnimateDiff(model=str(small_folder), **size)
    return {"backbone": backbone, "device": "cpu", "num_inference_steps": 1}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The negative prompt of every video that is drawn."""
    calls: list[Any] = []
    sample = AnimateDiffModel.sample

    def recorded(self: AnimateDiffModel, *arguments: Any, **options: Any) -> Any:
        calls.append(options.get("negative_prompt"))
        return sample(self, *arguments, **options)

    monkeypatch.setattr(AnimateDiffModel, "sample", recorded)
    return calls


def content(folder: str) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(Path(folder).iterdir())
        if path.suffix == ".mp4"
    }


def test_every_prompt_gets_a_named_file_that_is_drawn_once(
    model: dict[str, Any], drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = dv.generate(prompts="list.jsonl", out="whole", **model)
    assert [video.path for video in videos] == [Path("whole", name) for name in NAMES]
    assert list(content("whole")) == NAMES and drawn == [None, "blur", None]
    assert not any(video.existed for video in videos)
    # The same list grows: what exists stays, and equals a whole drawing.
    Path("short.jsonl").write_text("".join(LIST.splitlines(keepends=True)[:2]))
    dv.generate(prompts="short.jsonl", out="parts", **model)
    Path("parts", NAMES[0]).unlink()
    drawn.clear()
    videos = dv.generate(prompts="list.jsonl", out="parts", **model)
    assert [video.existed for video in videos] == [False, True, False] and len(drawn) == 2
    assert content("parts") == content("whole")
    assert Path("parts/metadata.jsonl").read_bytes() == Path("whole/metadata.jsonl").read_bytes()
    assert "video/mp4" in videos[1]._repr_html_()
    # Other settings draw anew.
    dv.generate(prompts="list.jsonl", out="parts", **{**model, "num_inference_steps": 2})
    assert len(drawn) == 5 and content("parts").keys() == content("whole").keys()
    assert content("parts")[NAMES[0]] != content("whole")[NAMES[0]]


def test_a_drawn_folder_is_a_list_of_prompts_and_a_folder_of_clips(model: dict[str, Any]) -> None:
    dv.generate(prompts="list.jsonl", out="drawn", **model)
    assert load_prompts("drawn/metadata.jsonl") == [
        Prompt(text="A dog, running!", seed=0),
        Prompt(text="a cat", seed=7, negative_prompt="blur"),
        Prompt(text="猫", seed=2),
    ]
    assert [clip.caption for clip in open_clips(Path("drawn"), SHAPE, scene_cuts=True)] == [
        "A dog, running!", "a cat", "猫"
    ]  # fmt: skip


def test_an_interrupted_drawing_keeps_what_is_finished(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dv.generate(prompts="list.jsonl", out="whole", **model)
    sample, calls = AnimateDiffModel.sample, []

    def interrupted(self: AnimateDiffModel, *arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, *arguments, **options)

    monkeypatch.setattr(AnimateDiffModel, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dv.generate(prompts="list.jsonl", out="parts", **model)
    rows = [json.loads(line) for line in Path("parts/metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == NAMES[:1]
    dv.generate(prompts="list.jsonl", out="parts", **model)
    assert content("parts") == content("whole") and len(calls) == 4


def test_several_prompts_and_videos_of_each(model: dict[str, Any]) -> None:
    videos = dv.generate(prompt=["a dog", "a cat"], num_videos=2, out="drawn", **model)
    assert [(video.prompt, video.seed) for video in videos] == [
        ("a dog", 0), ("a cat", 1), ("a dog", 2), ("a cat", 3)
    ]  # fmt: skip
    numbered = dv.generate(prompt="a dog", num_videos=2, out="a.gif", **model)
    assert [video.path for video in numbered] == [Path("a_00.gif"), Path("a_01.gif")]
    assert all(video.video is not None for video in numbered)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"prompt": ["a", "b"], "out": "v.mp4"}, "several prompts. Name a folder: --out v"),
        ({"prompt": "a", "prompts": "list.jsonl"}, "exclude each other"),
        ({"out": "v.avi"}, "end in .mp4, .gif, .webp or .png, and a folder has no ending"),
        ({"run": "run", "pairs": "pairs"}, "name two models"),
        ({"prompt": "a", "out": "foreign"}, "not a record of drawn videos .* another folder"),
        ({"prompts": "nosuch.txt"}, "Cannot read the prompts in 'nosuch.txt'"),
    ],
)
def test_what_cannot_be_written_is_refused(
    model: dict[str, Any], options: dict[str, Any], wrong: str
) -> None:
    Path("foreign").mkdir()
    Path("foreign/metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "mine"}\n')
    with pytest.raises(UserError, match=wrong):
        dv.generate(**options, **model)


def test_prompts_that_are_stored_with_pairs_need_no_text_encoder(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del model["num_inference_steps"]
    store = dv.build_pairs(
        dv.pairs.Jitter(num_inference_steps=1), prompts="list.jsonl", count=3, out="pairs",
        previews=False, **model,
    )  # fmt: skip
    run = dv.train(
        store, loss="global", out="run", steps=1, device="cpu",
        set={"train.validation_videos": 0, "train.report_to": "none", "train.rank": 2},
    )  # fmt: skip
    Path("stored.txt").write_text("A dog, running!\n猫\n")
    few: dict[str, Any] = {"num_inference_steps": 1, "device": "cpu"}
    expected = dv.generate(prompt="猫", **{**model, **few})[0].video
    score = dv.evaluate(run, prompts="stored.txt", out="one", metrics=["frame_difference"], **few)

    def refuse(self: AnimateDiffModel, prompts: Any) -> Any:
        raise AssertionError(f"encoded {prompts}")

    monkeypatch.setattr(AnimateDiffModel, "encode_prompts", refuse)
    (found,) = dv.generate(pairs=store, prompt="猫", **few)
    assert expected is not None and found.video is not None
    assert torch.equal(found.video, expected)
    again = dv.evaluate(run, prompts="stored.txt", out="two", metrics=["frame_difference"], **few)
    assert [each.base for each in again.metrics] == [each.base for each in score.metrics]
    # The stored negative prompt is not taken for another one.
    with pytest.raises(AssertionError, match="encoded \\['blur'\\]"):
        dv.generate(pairs=store, prompt="猫", set={"backbone.negative_prompt": "blur"}, **few)


def test_a_lora_generates_what_its_run_does(model: dict[str, Any], small_folder: Path) -> None:
    policy = adapt(load_small(small_folder), TrainSettings(rank=2), 0)
    for name, parameter in policy.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    policy.save_pretrained("lora")
    plain = dv.generate(prompt="a cat", **model)[0].video
    tuned = dv.generate(prompt="a cat", lora="lora/", **model)[0].video
    assert plain is not None and tuned is not None and not torch.equal(plain, tuned)
    first = dv.generate(prompts="list.jsonl", lora="lora", out="drawn", **model)
    assert not any(video.existed for video in first)
    assert all(each.existed for each in dv.generate(
        prompts="list.jsonl", lora="lora", out="drawn", **model
    ))  # fmt: skip
    with pytest.raises(UserError, match="A run and --lora name two models"):
        dv.generate("run", lora="lora", **model)
