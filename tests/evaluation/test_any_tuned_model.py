"""Anything can be evaluated: a LoRA of another program, two folders of videos; and by people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE, Said
from safetensors.torch import load_file, save_file
from small_wan import OPTIONS, load_small_wan, save_small_wan

import dpo_video as dv
from dpo_video.data.video_writer import write_video
from dpo_video.errors import UserError
from dpo_video.evaluation.adapter import put_on
from dpo_video.evaluation.human import HumanPreference, preference_in, wilson
from dpo_video.evaluation.judging import EvaluationTask, ask_people
from dpo_video.evaluation.results import Evaluation
from dpo_video.metric.dynamic_degree import TESTABLE
from dpo_video.settings import TrainSettings
from dpo_video.strategies import LabelTask, StoreLabeler
from dpo_video.testing import small_videos
from dpo_video.training.foreign_lora import peft_adapter
from dpo_video.training.lora import adapt
from dpo_video.workflows.evaluate import _TESTABLE


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and an adapter for it in PEFT's, diffusers' and ComfyUI's formats."""
    root = tmp_path_factory.mktemp("wan")
    save_small_wan(root / "model")
    policy = adapt(load_small_wan(root / "model"), TrainSettings(rank=2, alpha=6.0), 0)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if ".lora_B" in name:
            parameter.data = torch.randn_like(parameter)
    policy.save_pretrained(root / "peft")
    stored = load_file(root / "peft" / "adapter_model.safetensors")
    plain = {
        key.removeprefix("base_model.model."): value * (3.0 if "lora_B" in key else 1.0)
        for key, value in stored.items()
    }
    (root / "hub").mkdir()
    save_file(
        {f"transformer.{key}": value for key, value in plain.items()},
        root / "hub" / "pytorch_lora_weights.safetensors",
    )
    names = {"attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
             "attn1.to_out.0": "self_attn.o", "attn2.to_q": "cross_attn.q",
             "attn2.to_k": "cross_attn.k", "attn2.to_v": "cross_attn.v",
             "attn2.to_out.0": "cross_attn.o"}  # fmt: skip
    comfy = {}
    for key, value in plain.items():
        for ours, theirs in names.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        comfy[f"diffusion_model.{key}"] = value
    save_file(comfy, root / "comfy.safetensors")
    return root


def weights(folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    network = put_on(load_small_wan(folder), adapter)
    return dict(network.named_parameters())


@pytest.mark.parametrize("name", ["hub", "comfy.safetensors"])
def test_a_lora_of_any_origin_is_the_adapter_that_it_holds(
    wan: Path, name: str, tmp_path: Path
) -> None:
    model = load_small_wan(wan / "model")
    found = peft_adapter(str(wan / name), model, tmp_path / "adapter")
    ours, theirs = weights(wan / "model", wan / "peft"), weights(wan / "model", found)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value)
    assert peft_adapter(str(wan / "peft"), model, tmp_path / "no") == wan / "peft"


def test_a_lora_of_another_model_is_refused(wan: Path, tmp_path: Path) -> None:
    model = load_small_wan(wan / "model")
    stored = load_file(wan / "hub" / "pytorch_lora_weights.safetensors")
    other = {key.replace("blocks.1", "blocks.7"): value for key, value in stored.items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"'blocks\.7\..* first\) that are no LoRA of this model"):
        peft_adapter(str(tmp_path / "other.safetensors"), model, tmp_path / "adapter")
    for bad, message in (
        ("nothing/here/at/all", "no file or folder|There is no LoRA"),
        (str(tmp_path), "holds 1|no LoRA"),
        (str(wan / "model" / "model_index.json"), r"no \.safetensors file"),
    ):
        with pytest.raises(UserError, match=message):
            peft_adapter(bad, model, tmp_path / "adapter")


def test_one_command_evaluates_a_lora(wan: Path, said: Said, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red square\na blue circle\n")
    options = [f"--set=backbone.{name}={value}" for name, value in OPTIONS.items()]
    told = said(
        0, "evaluate", "--lora", wan / "comfy.safetensors", "--backbone=wan", "--device=cpu",
        f"--set=backbone.model={wan / 'model'}", *options, "--prompts=prompts.txt",
        "--metric=frame_difference", "--set=evaluate.num_inference_steps=1",
    )  # fmt: skip
    assert "runs/evaluation-comfy/index.html" in told
    found = Evaluation.load(tmp_path / "runs" / "evaluation-comfy")
    assert found.facts["LoRA"].endswith("comfy.safetensors") and found.name == "comfy.safetensors"
    assert found.metrics[0].base != found.metrics[0].tuned
    assert "Name what to evaluate" in said(2, "evaluate")
    assert "Name what to evaluate" in said(2, "evaluate", "--base", tmp_path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three videos with flicker, and without."""
    for number, video in enumerate(small_videos(3, SHAPE.frames, 32, 32)):
        write_video(tmp_path / "base" / f"clip_{number}.mp4", video, 8.0)
        still = video.mean(dim=1, keepdim=True).expand_as(video)
        write_video(tmp_path / "tuned" / f"clip_{number}.mp4", still, 8.0)
    (tmp_path / "base" / "clip_1.txt").write_text("a blue circle")
    return tmp_path / "base", tmp_path / "tuned"


METRICS: dict[str, Any] = {"metrics": ["frame_difference"]}


def test_two_folders_of_videos_are_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    found = dv.evaluate(base=base, tuned=tuned, out=tmp_path / "out", **METRICS)
    assert found.prompts == ("clip 0", "a blue circle", "clip 2") and found.seeds == ()
    (difference,) = found.metrics
    assert all(after < before / 4 for before, after in zip(
        difference.base, difference.tuned, strict=True
    ))  # fmt: skip
    page = (tmp_path / "out" / "index.html").read_text()
    assert "paired by their names" in page and "seed" not in page.split('id="videos"')[1][:9000]
    with pytest.raises(UserError, match="holds the evaluation of 'tuned against base'"):
        dv.evaluate(base=tuned, tuned=base, out=tmp_path / "out", **METRICS)
    (tuned / "clip_2.mp4").rename(tuned / "clip_9.mp4")
    with pytest.raises(UserError, match=r"'clip_2' of '.*base' first"):
        dv.evaluate(base=base, tuned=tuned, out=tmp_path / "odd", **METRICS)
    (tuned / "clip_9.mp4").unlink()
    write_video(tuned / "clip_2.mp4", small_videos(1, SHAPE.frames, 16, 32)[0], 8.0)
    with pytest.raises(UserError, match=r"differ in width x height \(32x32 and 32x16\)\. Export"):
        dv.evaluate(base=base, tuned=tuned, out=tmp_path / "odd", **METRICS)


def test_the_two_videos_of_a_pair_are_alike_in_length_and_speed(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = folders
    video = small_videos(1, SHAPE.frames, 32, 32)[0]
    write_video(tuned / "clip_1.mp4", video, 8.05)
    dv.evaluate(base=base, tuned=tuned, out=tmp_path / "out", **METRICS)
    write_video(tuned / "clip_1.mp4", video, 16.0)
    with pytest.raises(UserError, match=r"clip_1.mp4' differ in frame rate \(8 and 16 fps\)\. Exp"):
        dv.evaluate(base=base, tuned=tuned, out=tmp_path / "odd", **METRICS)
    write_video(tuned / "clip_1.mp4", video[:, :-1], 16.0)
    with pytest.raises(UserError, match=r"length \(4 and 3 frames\) and frame rate \(8 and"):
        dv.evaluate(base=base, tuned=tuned, out=tmp_path / "odd", **METRICS)


def test_a_report_on_folders_speaks_of_videos(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    found = dv.evaluate(base=base, tuned=tuned, out=tmp_path / "out", **METRICS)
    assert found.sample.startswith("3 videos in each folder, paired by their names;")
    assert found.verdict.headline == (
        "No verdict: the 3 pairs of videos have 3 different prompts, and a verdict needs 8 or more "
        "(add videos of other prompts to both folders)."
    )
    page = (tmp_path / "out" / "index.html").read_text()
    assert "tuned minus base of the two videos of one name" in page
    for word in (
        "same prompt",
        "training run",
        "training seed",
        "from each model",
        "--num-prompts",
    ):
        assert word not in page


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_prompts": 8}, "--num-prompts"),
        ({"prompts": "training"}, "--prompts"),
        ({"num_videos_per_prompt": 2}, "--num-videos-per-prompt"),
        ({"seed": 0}, r"evaluate\.seed"),
        ({"set": {"evaluate.guidance_scale": 2.0}}, r"evaluate\.guidance_scale"),
        ({"set": ["evaluate.num_prompts=8"]}, r"evaluate\.num_prompts"),
    ],
)
def test_options_of_drawing_are_refused_for_folders(
    folders: tuple[Path, Path], options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    base, tuned = folders
    with pytest.raises(UserError, match=rf"^{name} has no effect on finished videos.*Leave it out"):
        dv.evaluate(base=base, tuned=tuned, out=tmp_path / "out", **options, **METRICS)
    assert not (tmp_path / "out").exists()


def test_the_folders_to_compare_are_not_written_to(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = folders
    for out in (base, tuned, tmp_path / "base" / ".." / "base"):
        with pytest.raises(UserError, match="holds the videos to evaluate"):
            dv.evaluate(base=base, tuned=tuned, out=out, **METRICS)
    base.rename(tmp_path / "videos")  # the name of the evaluation's own folder of videos
    with pytest.raises(UserError, match="holds the videos to evaluate"):
        dv.evaluate(base=tmp_path / "videos", tuned=tuned, out=tmp_path, **METRICS)
    assert len(list(tuned.iterdir())) == 3


def test_videos_too_short_for_the_motion_metric_are_named(tmp_path: Path) -> None:
    assert _TESTABLE == TESTABLE
    for side in ("base", "tuned"):
        for name, video in zip("abcdefgh", small_videos(8), strict=True):
            write_video(tmp_path / side / f"{name}.mp4", video[:, :4], fps=8.0)
    evaluation = dv.evaluate(
        base=tmp_path / "base", tuned=tmp_path / "tuned", out=tmp_path / "out",
        metrics=["frame_difference", "dynamic_degree"],
    )  # fmt: skip
    assert evaluation.verdict.details[-1].startswith("Videos of 4 frames are too short")


def test_only_one_thing_is_evaluated(folders: tuple[Path, Path]) -> None:
    base, tuned = folders
    with pytest.raises(UserError, match=r"exclude one another; name one of them"):
        dv.evaluate(lora="some.safetensors", base=base, tuned=tuned)


@pytest.mark.parametrize("flag", ["min-effect", "tolerance"])
def test_a_threshold_must_be_a_number(flag: str, folders: tuple[Path, Path], said: Said) -> None:
    base, tuned = folders
    told = said(2, "evaluate", "--base", base, "--tuned", tuned, f"--{flag}", "nan")
    assert f"evaluate.{flag.replace('-', '_')} = nan: a finite number is needed." in told
    told = said(2, "evaluate", "--base", base, "--tuned", tuned, f"--{flag}", "-0.1")
    assert "it must be at least 0" in told


class Fan(StoreLabeler):
    """Prefers the first video of every pair (the base's) but the last, which it finds equal."""

    def label_store(self, task: LabelTask) -> None:
        for pair in task.pairs:
            first, second = task.videos(pair)
            assert first.shape == second.shape and task.prompt(pair)
            task.record(pair, [0.0 if pair == max(task.pairs) else 1.0], rater="fan")
        task.record(0, ["skip"], rater="other")


def test_peoples_preference_is_on_the_report(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    options = {"base": base, "tuned": tuned, "out": tmp_path / "out", **METRICS}
    before = dv.evaluate(**options)
    found = ask_people(tmp_path / "out", Fan())
    assert found.preference == HumanPreference(pairs=3, raters=1, tuned=0, base=2, equal=1)
    assert found.preference.rate == 0 and found.verdict == before.verdict
    page = (tmp_path / "out" / "index.html").read_text()
    assert found.preference.text in page.replace("&#39;", "'")
    assert dv.evaluate(**options).preference == found.preference  # the answers are kept
    task = EvaluationTask(tmp_path / "out", found)
    assert task.labels_by("fan") == {0: (1.0,), 1: (1.0,), 2: (0.0,)}
    task.record(1, [-1.0], rater="another")
    vote = preference_in(tmp_path / "out", 3)
    assert vote is not None and (vote.base, vote.equal, vote.raters) == (1, 2, 2)


def test_wilsons_interval() -> None:
    # Newcombe 1998, table I, method 3: 81/263 and 15/148; 0 of 20.
    for wins, count, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
    ):  # fmt: skip
        assert wilson(wins, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1
    with pytest.raises(ValueError, match="3 wins in 2 trials"):
        wilson(3, 2)
