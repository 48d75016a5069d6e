"""A pair builder for dpo-video that comes from outside it."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Generator, Tensor

from dpo_video.errors import UserError
from dpo_video.strategies import Labeler, PairBuilder, VideoModel
from dpo_video.types import Clip, Pair


@final
class Shuffle(PairBuilder):
    """The loser has a stretch of the clip's frames in the wrong order; the rest is the same.

    Frames out of order are the classic test of whether a network understands time (Misra et al.
    2016, arXiv 1603.08561). Every frame is as good as before, so that nothing but time tells the
    two apart. The label and the region cover the stretch alone: `segment` and `region` losses learn
    from it, and the frames around it are ties.
    """

    asks_labeler: ClassVar[bool] = False

    frames: int = Field(default=8, ge=2)
    """Length of the stretch; the whole clip where it is shorter."""

    @property
    def needs_video(self) -> bool:
        """Always: frames of a real clip are what is put out of order."""
        return True

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Put a stretch of the clip out of order."""
        if clip.video is None:
            raise UserError(
                "Pairs of kind 'shuffle' are made of real videos, and this is a prompt alone. Name "
                "a folder with --clips DIR."
            )
        total = clip.video.shape[1]
        if total < 2:
            raise UserError(
                f"'{clip.name}' is a single frame, which has no order. Use videos of 2 frames or "
                "more."
            )
        length = min(self.frames, total)
        start = int(torch.randint(total - length + 1, (), generator=generator))
        order = torch.arange(total)
        order[start : start + length] = start + _disorder(length, generator)
        # Both through the same encoder at once: what it does to a video, it does to both.
        winner, loser = model.encode_videos(torch.stack([clip.video, clip.video[:, order]])).cpu()
        stretch = torch.zeros(winner.shape[1])
        stretch[model.latent_frames(slice(start, start + length))] = 1
        region = stretch[None, :, None, None].expand(1, *winner.shape[1:]).contiguous()
        return Pair(
            first=winner,
            # An encoder that mixes frames would let the stretch leak into its neighbours.
            second=torch.where(region > 0, loser, winner),
            preference=stretch,
            region=region,
            prompt=clip.caption,
            source=clip.name,
        )


def _disorder(length: int, generator: Generator) -> Int[Tensor, " length"]:
    """A permutation that is neither the order of the frames nor the reverse of it, if there is one.

    A stretch in reverse is smooth, and often as good a video as before.
    """
    forward = torch.arange(length)
    while True:
        order = torch.randperm(length, generator=generator)
        smooth = order.equal(forward) or order.equal(forward.flip(0))
        if not smooth or (length == 2 and not order.equal(forward)):
            return order
