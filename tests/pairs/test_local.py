"""Local: the clip is preferred to a copy that is repainted inside its region only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Generator, Tensor

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.errors import UserError
from dpo_video.pairs.local import Local
from dpo_video.testing import check_pairs
from dpo_video.types import Clip, Pair


def made(model: AnimateDiffModel, clip: Clip, seed: int = 0, **options: Any) -> Pair:
    builder = Local(**{"num_inference_steps": 4, **options})
    return builder(clip, model, None, Generator().manual_seed(seed))


def test_the_builder_passes_the_contract_for_every_alpha(
    small_model: AnimateDiffModel, clip: Clip
) -> None:
    for alpha in (0.25, 1.0):
        check_pairs(Local(num_inference_steps=4, alphas=(alpha,)), small_model, clip=clip)


def test_outside_the_region_both_videos_are_equal_to_the_bit(
    small_model: AnimateDiffModel, clip: Clip
) -> None:
    for seed in range(5):
        pair = made(small_model, clip, seed)
        inside = (pair.region > 0).expand_as(pair.first)
        assert torch.equal(pair.first[~inside], pair.second[~inside])
        assert (pair.first[inside] != pair.second[inside]).float().mean() > 0.99
        assert 0 < pair.region.mean() < 1


def test_the_chosen_video_is_the_encoded_clip(small_model: AnimateDiffModel, clip: Clip) -> None:
    pair = made(small_model, clip)
    assert clip.video is not None
    assert torch.equal(pair.first, small_model.encode_videos(clip.video[None])[0])
    assert (pair.preference == 1).all()
    assert pair.prompt == clip.caption and pair.source == clip.name


def test_alpha_is_drawn_from_the_grid_and_stored_as_strength(
    small_model: AnimateDiffModel, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    original = small_model.sample

    def spy(*arguments: Any, strength: float, **options: Any) -> Tensor:
        asked.append(strength)
        return original(*arguments, strength=strength, **options)

    monkeypatch.setattr(small_model, "sample", spy)
    strengths = [made(small_model, clip, seed).strength for seed in range(30)]
    assert strengths == asked  # one sampling pass a pair
    assert set(strengths) == {0.75, 0.80, 0.85, 0.90}


def test_a_higher_alpha_changes_more(small_model: AnimateDiffModel, clip: Clip) -> None:
    def change(alpha: float) -> float:
        pairs = [
            made(small_model, clip, seed, num_inference_steps=10, alphas=(alpha,))
            for seed in range(5)
        ]
        return sum((pair.second - pair.first).norm().item() for pair in pairs)

    assert change(0.1) < change(0.5) < change(1.0)


def test_mask_options_reach_the_region(small_model: AnimateDiffModel, clip: Clip) -> None:
    def area(**mask: float) -> float:
        pairs = [made(small_model, clip, seed, mask=mask) for seed in range(20)]
        return sum(pair.region.mean().item() for pair in pairs)

    assert area(max_blobs=1, min_size=0.3) < area(max_blobs=5, min_size=0.9, shrink_share=0)
    still = [made(small_model, clip, seed, mask={"moving_share": 0}) for seed in range(5)]
    for pair in still:
        assert torch.equal(pair.region, pair.region[:, :1].expand_as(pair.region))


def test_the_prefix_is_sampled_with_and_not_stored(
    small_model: AnimateDiffModel, clip: Clip
) -> None:
    prefix = "a blue star "
    prefixed = made(small_model, clip, prompt_prefix=prefix)
    renamed = made(small_model, replace(clip, caption=prefix + clip.caption))
    assert torch.equal(prefixed.second, renamed.second)
    assert prefixed.prompt == clip.caption
    plain = made(small_model, clip)
    assert not torch.equal(prefixed.second, plain.second)
    assert torch.equal(prefixed.first, plain.first)


@pytest.mark.parametrize("options", [{"alphas": (0.0,)}, {"alphas": (1.1,)}, {"mask": {"x": 1}}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Local(**options)


def test_a_clip_without_a_video_is_refused(small_model: AnimateDiffModel) -> None:
    with pytest.raises(UserError, match=r"need real videos.*--clips DIR"):
        made(small_model, Clip(name="prompt", caption="a red square"))
