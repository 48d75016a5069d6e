"""Negative prompts: every family is guided away from them, wherever it samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, SHAPE
from diffusers import AnimateDiffPipeline, DDIMScheduler, WanPipeline
from small_cogvideox import OPTIONS as COGVIDEOX
from small_cogvideox import TEXT_LENGTH, stock_pipeline
from small_wan import OPTIONS as WAN
from small_wan import save_small_wan
from torch import Generator, Tensor

import dpo_video as dv
from dpo_video.backbone.animatediff import AnimateDiff
from dpo_video.backbone.cogvideox import CogVideoX
from dpo_video.backbone.tiny import Tiny
from dpo_video.backbone.wan import Wan
from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.errors import UserError
from dpo_video.evaluation.evaluate import sample_videos
from dpo_video.pairs.local import Local
from dpo_video.settings import EvaluateSettings
from dpo_video.strategies import VideoModel
from dpo_video.types import Clip, Placement, Prompt
from dpo_video.workflows.config import resolve

PROMPT, NEGATIVE = "a red square moving left slowly", "a blue star"
SMALL = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}


@dataclass(frozen=True)
class Family:
    """A small checkpoint of a family."""

    load: Callable[..., VideoModel]
    pipeline: Callable[[VideoModel], Any]
    call: dict[str, Any]


@pytest.fixture(scope="module", params=["animatediff", "cogvideox", "wan"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    backbones: dict[str, Any] = {"animatediff": AnimateDiff, "cogvideox": CogVideoX, "wan": Wan}
    shapes: dict[str, dict[str, Any]] = {"animatediff": SMALL, "cogvideox": COGVIDEOX, "wan": WAN}
    call: dict[str, Any] = {"max_sequence_length": TEXT_LENGTH}
    if request.param == "wan":
        folder = save_small_wan(tmp_path_factory.mktemp("wan"))
        pipeline: Any = lambda model: WanPipeline.from_pretrained(folder)  # noqa: E731
    elif request.param == "cogvideox":
        folder = request.getfixturevalue("small_cogvideox")
        pipeline = lambda model: stock_pipeline(folder)  # noqa: E731
    else:
        folder, pipeline, call = request.getfixturevalue("small_folder"), stock_animatediff, {}
    shape = shapes[request.param]

    def load(**options: Any) -> VideoModel:
        model: VideoModel = backbones[request.param](model=str(folder), **shape, **options).load(
            Placement(CPU)
        )
        return model

    size = {"num_frames": shape["frames"], "height": shape["height"], "width": shape["width"]}
    return Family(load, pipeline, {**call, **size})


def stock_animatediff(model: Any) -> AnimateDiffPipeline:
    return AnimateDiffPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.denoiser,
        motion_adapter=None,
        scheduler=DDIMScheduler.from_config(model.scheduler.config),
    )


def sampled(model: VideoModel, noise: Tensor, **options: Any) -> Tensor:
    return model.sample(
        model.encode_prompts([PROMPT]), noise, num_inference_steps=3, guidance_scale=4.0, **options
    )


def test_it_is_that_of_the_pipeline_and_empty_changes_nothing(family: Family) -> None:
    model, guided = family.load(), family.load(negative_prompt=NEGATIVE)
    noise = torch.randn(1, *model.latent_shape, generator=Generator().manual_seed(0))
    plain, away = sampled(model, noise), sampled(guided, noise)
    assert torch.equal(sampled(family.load(negative_prompt=""), noise), plain)
    assert torch.equal(sampled(model, noise, negative_prompt=""), plain)
    assert torch.equal(sampled(model, noise, negative_prompt=NEGATIVE), away)
    assert torch.equal(sampled(guided, noise, negative_prompt=""), plain)  # both are kept
    assert not torch.allclose(plain, away, atol=1e-3)
    pipeline = family.pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    cogvideox = type(pipeline).__name__ == "CogVideoXPipeline"
    theirs = pipeline(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=3, guidance_scale=4.0,
        latents=noise.transpose(1, 2) if cogvideox else noise, output_type="latent", **family.call,
    ).frames  # fmt: skip
    expected = theirs.transpose(1, 2) if cogvideox else theirs
    torch.testing.assert_close(away, expected, rtol=1e-4, atol=1e-4)


def test_the_export_names_it(family: Family) -> None:
    specs = [family.load(negative_prompt=prompt).export_spec() for prompt in ("", NEGATIVE)]
    assert [spec and spec.call.get("negative_prompt") for spec in specs] == [None, NEGATIVE]


def test_generate_evaluate_and_pairs_use_it(
    small_folder: Path, clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation videos are sampled by the call that `evaluate` makes."""
    monkeypatch.chdir(tmp_path)
    backbone = AnimateDiff(model=str(small_folder), **SMALL, negative_prompt=NEGATIVE)
    guided = backbone.load(Placement(CPU))
    plain = backbone.model_copy(update={"negative_prompt": ""}).load(Placement(CPU))

    def drawn(model: VideoModel, **options: Any) -> Tensor:
        return model.decode_videos(
            model.sample(
                model.encode_prompts([PROMPT]), initial_noise(model, [0]), num_inference_steps=2,
                **options,
            )
        )  # fmt: skip

    away = drawn(plain, negative_prompt=NEGATIVE)
    assert not torch.equal(away, drawn(plain))
    (video,) = dv.generate(backbone=backbone, prompt=PROMPT, num_inference_steps=2, device="cpu")
    assert torch.equal(video.video, away[0])
    settings = EvaluateSettings(num_inference_steps=2)
    assert torch.equal(
        next(sample_videos(guided, guided.denoiser, [Prompt(text=PROMPT)], settings)), away
    )

    def pair(model: VideoModel, **options: Any) -> Tensor:
        builder = Local(num_inference_steps=4, **options)
        return builder(clip, model, None, Generator().manual_seed(0)).second

    assert torch.equal(pair(guided), pair(plain, negative_prompt=NEGATIVE))
    assert torch.equal(pair(guided, negative_prompt=""), pair(plain))
    assert not torch.equal(pair(guided), pair(plain))


def test_it_is_part_of_what_identifies_pairs_and_base_videos() -> None:
    """Both are keyed by the backbone's table."""
    named = resolve(assignments=[f"backbone.negative_prompt={NEGATIVE}"])
    assert named.tables["backbone"]["negative_prompt"] == NEGATIVE
    assert resolve().tables["backbone"] != named.tables["backbone"]
    assert named.backbone == Tiny(negative_prompt=NEGATIVE)


def test_only_cogvideox_has_dynamic_guidance(small_model: VideoModel, clip: Clip) -> None:
    with pytest.raises(UserError, match=r"Only CogVideoX has dynamic guidance\. Leave it out"):
        Local(dynamic_guidance=True)(clip, small_model, None, Generator().manual_seed(0))
    Local(dynamic_guidance=False, num_inference_steps=2)(clip, small_model, None, Generator())
