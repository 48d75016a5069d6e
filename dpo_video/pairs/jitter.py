"""Clip-level pairs: a video against the same video with noise on every frame."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Generator

from dpo_video.pairs._winner import OWN_SAMPLE, Winner, winning_video
from dpo_video.strategies import Labeler, PairBuilder, VideoModel
from dpo_video.types import Clip, Pair, Videos


@final
class Jitter(PairBuilder):
    """The loser flickers: every frame gets noise and a colour shift of its own.

    Video-DPO's "noise injection": `clip01(frame + s N(0, 1) + U(-s/4, s/4) per channel)`. Both
    videos go through the same encoder, so that nothing else tells them apart.
    """

    asks_labeler: ClassVar[bool] = False

    winner: Winner = "sample"
    """The model's own sample of the prompt, or the real clip."""
    noise: float = Field(default=0.15, gt=0, le=1)
    """`s`, in units of the pixel range."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Sampling steps of the winner; the backbone's own number when not set (25 in the paper)."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Classifier-free guidance of the winner; the backbone's own when not set (7.5)."""

    @property
    def needs_video(self) -> bool:
        """Only when the real clip wins."""
        return self.winner == "clip"

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Jitter a sample or the clip."""
        video = winning_video(
            self.winner,
            clip,
            model,
            generator,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )
        both = torch.cat([video, jitter(video, self.noise, generator)])
        winner, loser = model.encode_videos(both).cpu()
        frames = winner.shape[1]
        return Pair(
            first=winner,
            second=loser,
            preference=torch.ones(frames),
            region=torch.ones(1, *winner.shape[1:]),
            prompt=clip.caption,
            source=clip.name if self.winner == "clip" else OWN_SAMPLE,
        )


def jitter(videos: Videos, noise: float, generator: Generator) -> Videos:
    """Noise on every pixel and a shift per channel, drawn anew for every frame."""
    batch, channels, frames, _, _ = videos.shape
    grain = noise * torch.randn(videos.shape, generator=generator)
    shift = torch.rand(batch, channels, frames, 1, 1, generator=generator) * 2 - 1
    return (videos + grain + noise / 4 * shift).clamp(0, 1)
