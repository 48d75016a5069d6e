"""The judge of `tiny`'s videos, and the metric that uses it."""

from __future__ import annotations

import pytest
import torch

from dpo_video.errors import UserError
from dpo_video.metric.caption_match import CaptionMatch
from dpo_video.support.rng import generator
from dpo_video.tiny import scenes
from dpo_video.tiny.judge import WEIGHTS, judge_videos, load_judge

Clips = tuple[torch.Tensor, list[str]]


@pytest.fixture(scope="module")
def clips() -> Clips:
    drawn = scenes.draw_scenes(48, generator("test", "judge"))
    return scenes.render(drawn).transpose(1, 2), drawn.captions()


def test_the_judge_is_small_frozen_and_loaded_once() -> None:
    judge = load_judge()
    assert judge is load_judge()
    assert sum(parameter.numel() for parameter in judge.parameters()) <= 150_000
    assert WEIGHTS.stat().st_size < 400_000
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in judge.parameters())


def test_right_captions_match(clips: Clips) -> None:
    found = CaptionMatch()(*clips)
    assert found.shape == (48,)
    # Half of the training images were damaged, so the judge is never certain of a shape.
    assert found.mean() > 0.92
    assert found.min() > 0.7


@pytest.mark.parametrize("axis", ["shape", "color", "background"])
def test_a_caption_with_one_wrong_word_does_not_match(axis: str, clips: Clips) -> None:
    videos, captions = clips
    names = {
        "shape": list(scenes.SHAPES),
        "color": list(scenes.COLORS),
        "background": list(scenes.BACKGROUNDS),
    }[axis]
    wrong = []
    for text in captions:
        words = scenes.parse_caption(text)
        assert words is not None
        changed = dict(vars(words))
        changed[axis] = names[(names.index(changed[axis]) + 1) % len(names)]
        wrong.append(scenes.caption(**changed))
    assert CaptionMatch()(videos, wrong).max() < 0.05


def test_the_other_words_of_a_caption_are_ignored(clips: Clips) -> None:
    videos, captions = clips
    swapped = [
        text.replace("slowly", "?").replace("quickly", "slowly").replace("?", "quickly")
        for text in captions
    ]
    assert torch.equal(CaptionMatch()(videos, swapped), CaptionMatch()(videos, captions))


def test_a_prompt_of_another_world_is_refused() -> None:
    videos = torch.zeros(1, 3, 2, 64, 64)
    with pytest.raises(UserError, match="a cat on a sofa"):
        CaptionMatch()(videos, ["a cat on a sofa"])


def test_other_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"64x64 pixels, and these have 48x32"):
        judge_videos(torch.zeros(1, 3, 2, 32, 48))
