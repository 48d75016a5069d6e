"""Ranked: the pair is the best and the worst sample; equal samples are a tie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from conftest import SHAPE
from test_contracts import Brighter
from torch import Generator, Tensor

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.errors import UserError
from dpo_video.pairs.ranked import Ranked, rank
from dpo_video.strategies import Labeler
from dpo_video.testing import check_pairs
from dpo_video.types import Clip, Pair

HALVES = [slice(0, 2), slice(2, 4)]


class Fixed(Labeler):
    """Returns given labels for two videos, whose pixels hold their number."""

    says: Mapping[str, tuple[float, ...]]
    """Labels by "one-other"."""

    def __call__(
        self, prompts: Sequence[str], first: Tensor, second: Tensor, segments: Sequence[slice]
    ) -> Tensor:
        one, other = (round(10 * float(video.mean())) for video in (first, second))
        return torch.tensor([self.says[f"{one}-{other}"]])


def numbered(count: int) -> Tensor:
    """Videos whose every pixel is a tenth of their number."""
    return (torch.arange(count) / 10)[:, None, None, None, None].expand(-1, 3, 4, 2, 2)


def made(
    model: AnimateDiffModel, clip: Clip, labeler: Labeler | None, seed: int = 0, **options: int
) -> Pair:
    return Ranked(**options)(clip, model, labeler, Generator().manual_seed(seed))  # type: ignore[arg-type]


class Undecided(Labeler):
    """Labels every segment a tie."""

    def __call__(
        self, prompts: Sequence[str], first: Tensor, second: Tensor, segments: Sequence[slice]
    ) -> Tensor:
        return torch.zeros(len(prompts), len(segments))


def test_the_builder_passes_the_contract(small_model: AnimateDiffModel, clip: Clip) -> None:
    check_pairs(Ranked(samples=2), small_model, clip=clip, labeler=Brighter())


def test_the_pair_is_the_best_and_the_worst_sample(
    small_model: AnimateDiffModel, clip: Clip
) -> None:
    """With one whole segment, the labeler's order is the videos' brightness."""
    generator = Generator().manual_seed(0)
    noises = torch.randn(5, *small_model.latent_shape, generator=generator)
    context = small_model.encode_prompts([clip.caption])
    drawn = torch.cat([small_model.sample(context, noise[None]) for noise in noises])
    brightness = small_model.decode_videos(drawn).mean(dim=(1, 2, 3, 4))
    pair = made(small_model, clip, Brighter(), samples=5)
    assert torch.equal(pair.first, drawn[brightness.argmax()])
    assert torch.equal(pair.second, drawn[brightness.argmin()])
    assert (pair.preference == 1).all() and (pair.region == 1).all()
    assert pair.preference.shape == (SHAPE.frames,)
    assert pair.prompt == clip.caption and pair.strength == 0


def test_the_majority_of_segments_decides_a_comparison() -> None:
    says = {"0-1": (1.0, 1.0, -1.0), "0-2": (0.1, 0.1, -1.0), "1-2": (0.0, 0.0, 0.0)}
    standing = rank(numbered(3), "", Fixed(says=says), [*HALVES, HALVES[0]])
    assert [won for won, _ in standing] == [2, -1, -1]
    assert [total for _, total in standing] == pytest.approx([0.2, -1.0, 0.8])


def test_the_sum_of_labels_breaks_equal_counts() -> None:
    """Each sample wins one comparison and loses one; the sums of their labels order them."""
    circle = {"0-1": (0.2, 0.2), "1-2": (1.0, 1.0), "0-2": (-0.5, -0.5)}
    standing = rank(numbered(3), "", Fixed(says=circle), HALVES)
    assert [won for won, _ in standing] == [0, 0, 0]
    order = sorted(range(3), key=lambda sample: standing[sample], reverse=True)
    assert order == [1, 0, 2]
    even = {"0-1": (0.1, 0.2), "1-2": (0.1, 0.2), "0-2": (-0.1, -0.2)}
    assert len(set(rank(numbered(3), "", Fixed(says=even), HALVES))) == 1


def test_equal_samples_are_a_tie_of_two_different_videos(
    small_model: AnimateDiffModel, clip: Clip
) -> None:
    pair = made(small_model, clip, Undecided(), samples=3)
    assert (pair.preference == 0).all()
    assert not torch.equal(pair.first, pair.second)


def test_every_sample_has_its_own_noise_whatever_their_number(
    small_model: AnimateDiffModel, clip: Clip
) -> None:
    firsts = [made(small_model, clip, Undecided(), samples=count) for count in (2, 4)]
    assert torch.equal(firsts[0].first, firsts[1].first)  # the earlier drawn stands before
    assert not torch.equal(firsts[0].second, firsts[1].second)


def test_ranked_needs_a_labeler_but_no_video(small_model: AnimateDiffModel, clip: Clip) -> None:
    bare = Clip(name="prompt", caption=clip.caption)
    one, two = (made(small_model, of, Brighter(), samples=2) for of in (bare, clip))
    assert torch.equal(one.first, two.first)
    with pytest.raises(UserError, match=r"need a labeler.*--labeler NAME"):
        made(small_model, bare, None)
