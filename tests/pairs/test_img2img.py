"""Img2img: every frame is regenerated on its own, and nothing else distinguishes the videos."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Generator, Tensor

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.errors import UserError
from dpo_video.pairs.img2img import Img2Img
from dpo_video.pairs.jitter import Jitter
from dpo_video.testing import check_pairs
from dpo_video.types import Clip, Pair


def made(model: AnimateDiffModel, clip: Clip, seed: int = 0, **options: Any) -> Pair:
    return Img2Img(**options)(clip, model, None, Generator().manual_seed(seed))


def test_the_builder_passes_the_contract(small_model: AnimateDiffModel, clip: Clip) -> None:
    check_pairs(Img2Img(chosen="sample"), small_model, clip=clip)
    check_pairs(Img2Img(chosen="clip"), small_model, clip=clip)


def test_every_frame_is_regenerated_on_its_own_with_its_own_noise(
    small_model: AnimateDiffModel, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    original = small_model.sample

    def spy(context: Any, noise: Tensor, **options: Any) -> Tensor:
        if options.get("per_frame"):
            calls.append({"noise": noise, **options})
        return original(context, noise, **options)

    monkeypatch.setattr(small_model, "sample", spy)
    made(small_model, clip, chosen="clip")
    (call,) = calls
    assert call["strength"] == 0.15 and call["num_inference_steps"] == 20
    frames = call["noise"][0].transpose(0, 1).flatten(1)
    assert (torch.corrcoef(frames) - torch.eye(len(frames))).abs().max() < 0.4
    # A frame depends on no other frame: changing all others does not change the first.
    other = call["clean"].clone()
    other[:, :, 1:] += 1
    names = ("strength", "per_frame", "num_inference_steps", "guidance_scale")
    options = {name: call[name] for name in names}
    context = small_model.encode_prompts([clip.caption])
    one, two = (
        original(context, call["noise"], clean=clean, **options) for clean in (call["clean"], other)
    )
    torch.testing.assert_close(one[:, :, 0], two[:, :, 0])
    assert (one[:, :, 1:] != two[:, :, 1:]).any()


def test_both_videos_are_encoded_alike(
    small_model: AnimateDiffModel, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regeneration that changes nothing leaves both videos equal, so there is no shortcut."""
    original = small_model.sample

    def unchanged(context: Any, noise: Tensor, **options: Any) -> Tensor:
        return options["clean"] if options.get("per_frame") else original(context, noise, **options)

    monkeypatch.setattr(small_model, "sample", unchanged)
    for chosen in ("sample", "clip"):
        pair = made(small_model, clip, chosen=chosen)
        assert torch.equal(pair.first, pair.second)


def test_the_chosen_video_is_first_everywhere(small_model: AnimateDiffModel, clip: Clip) -> None:
    pair = made(small_model, clip)
    assert (pair.preference == 1).all() and (pair.region == 1).all()
    assert pair.strength == 0.15 and pair.prompt == clip.caption and pair.source == "own sample"
    assert made(small_model, clip, chosen="clip").source == clip.name


def test_the_chosen_sample_equals_jitters(
    small_model: AnimateDiffModel, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    original = small_model.encode_videos

    def spy(videos: Tensor) -> Tensor:
        seen.append(videos)
        return original(videos)

    monkeypatch.setattr(small_model, "encode_videos", spy)
    made(small_model, clip, seed=3)
    Jitter()(clip, small_model, None, Generator().manual_seed(3))
    assert torch.equal(seen[0][0], seen[-1][0])


def test_a_higher_strength_changes_the_rejected_video_more(
    small_model: AnimateDiffModel, clip: Clip
) -> None:
    def change(strength: float) -> float:
        pair = made(small_model, clip, chosen="clip", strength=strength)
        return (pair.second - pair.first).norm().item()

    assert change(0.05) < change(0.3)


@pytest.mark.parametrize(
    "options", [{"strength": 0.0}, {"strength": 0.02}, {"steps": 3}, {"strength": 1.2}]
)
def test_a_strength_that_runs_no_step_is_refused(options: dict[str, Any]) -> None:
    """Running one step anyway would apply another strength."""
    with pytest.raises(ValidationError):
        Img2Img(**options)


def test_a_chosen_clip_needs_a_video(small_model: AnimateDiffModel) -> None:
    bare = Clip(name="prompt", caption="a red square")
    with pytest.raises(UserError, match=r"--clips DIR.*--set pairs\.chosen=sample"):
        made(small_model, bare, chosen="clip")
