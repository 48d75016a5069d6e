"""Tests of the pair builder; run pytest in this folder after installing the package."""

from __future__ import annotations

import pytest
import torch
from dpo_video_shuffle import Shuffle, _disorder

from dpo_video.backbone.tiny import Tiny
from dpo_video.errors import UserError
from dpo_video.strategies import VideoModel
from dpo_video.testing import check_pairs, small_videos
from dpo_video.types import Clip, Pair, Placement


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return Tiny().load(Placement())


def pair_of(model: VideoModel, builder: Shuffle, seed: int = 0) -> Pair:
    shape = model.shape
    video = small_videos(1, shape.frames, shape.height, shape.width)[0]
    clip = Clip(name="random", caption="a red square moving left slowly", video=video)
    return builder(clip, model, None, torch.Generator().manual_seed(seed))


def test_the_builder_passes_the_contract(model: VideoModel) -> None:
    check_pairs(Shuffle(), model)


def test_only_the_stretch_is_labelled_and_differs(model: VideoModel) -> None:
    pair = pair_of(model, Shuffle(frames=3))
    labelled = pair.preference.nonzero().flatten()
    assert len(labelled) == 3 and (labelled.diff() == 1).all()
    assert torch.equal(pair.region[0, :, 0, 0], pair.preference)
    same = [torch.equal(pair.first[:, f], pair.second[:, f]) for f in range(len(pair.preference))]
    assert not all(same[f] for f in labelled)
    assert all(same[f] for f in range(len(same)) if f not in labelled)


def test_the_rejected_video_has_the_same_frames(model: VideoModel) -> None:
    """The tiny model encodes each frame on its own, so the latent frames are a permutation."""
    pair = pair_of(model, Shuffle())

    def frames(latents: torch.Tensor) -> torch.Tensor:
        return latents.flatten(2).mean(dim=2).sum(dim=0).sort().values

    torch.testing.assert_close(frames(pair.first), frames(pair.second), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [2, 3, 4, 9])
def test_a_stretch_is_neither_in_order_nor_reversed(length: int) -> None:
    for seed in range(30):
        order = _disorder(length, torch.Generator().manual_seed(seed))
        assert sorted(order.tolist()) == list(range(length)) != order.tolist()
        assert length == 2 or order.tolist() != list(range(length))[::-1]


def test_a_clip_without_a_video_is_refused(model: VideoModel) -> None:
    with pytest.raises(UserError, match="--clips DIR"):
        Shuffle()(Clip(name="prompt", caption="a"), model, None, torch.Generator())


def test_a_single_frame_is_refused(model: VideoModel) -> None:
    still = Clip(name="still.png", caption="a", video=small_videos(1, frames=1)[0])
    with pytest.raises(UserError, match=r"'still\.png' has one frame"):
        Shuffle()(still, model, None, torch.Generator())
