"""The pair builder `shuffle`: an example of a plugin for dpo-video."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from dpo_video.plugin import Clip, Field, Labeler, Pair, PairBuilder, UserError, VideoModel


@final
class Shuffle(PairBuilder):
    """Shuffle: puts a stretch of a real clip's frames out of order; the clip is the chosen video.

    Every frame is a real one, so only the order distinguishes the two videos. Misra et al. 2016
    (arXiv 1603.08561) train networks to recognise frames out of order. The label and the region
    cover the stretch alone: the losses `segment` and `region` train on it, and the other frames are
    ties.
    """

    asks_labeler: ClassVar[bool] = False

    frames: int = Field(default=8, ge=2)
    """Number of frames in the stretch; the whole clip if it has fewer."""

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Put a stretch of the clip out of order."""
        if clip.video is None:
            raise UserError(
                "Pairs of kind 'shuffle' need real videos. Name a folder with --clips DIR."
            )
        total = clip.video.shape[1]
        if total < 2:
            raise UserError(f"'{clip.name}' has one frame. Use videos of at least 2 frames.")
        length = min(self.frames, total)
        start = int(torch.randint(total - length + 1, (), generator=generator))
        order = torch.arange(total)
        order[start : start + length] = start + _disorder(length, generator)
        # One call encodes both videos, so the encoder cannot distinguish them.
        chosen, shuffled = model.encode_videos(
            torch.stack([clip.video, clip.video[:, order]])
        ).cpu()
        stretch = torch.zeros(chosen.shape[1])
        stretch[model.latent_frames(slice(start, start + length))] = 1
        region = stretch[None, :, None, None].expand(1, *chosen.shape[1:]).contiguous()
        return Pair(
            first=chosen,
            # An encoder that mixes frames also changes the latents of neighbouring frames.
            second=torch.where(region > 0, shuffled, chosen),
            preference=stretch,
            region=region,
            prompt=clip.caption,
            source=clip.name,
        )


def _disorder(length: int, generator: Generator) -> Int[Tensor, " length"]:
    """A permutation other than the identity and, for more than two frames, the reverse.

    A reversed stretch is smooth, and often as good as the original.
    """
    forward = torch.arange(length)
    while True:
        order = torch.randperm(length, generator=generator)
        smooth = order.equal(forward) or order.equal(forward.flip(0))
        if not smooth or (length == 2 and not order.equal(forward)):
            return order
