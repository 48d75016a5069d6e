"""Clip-level pairs: a video and the same video with noise on every frame."""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field
from torch import Generator

from dpo_video.pairs._chosen import FromChosen
from dpo_video.strategies import Labeler, VideoModel
from dpo_video.types import Clip, Pair, Videos


@final
class Jitter(FromChosen):
    """Video-DPO's noise injection: adds noise and a colour shift to every frame.

    The rejected video is `clip01(frame + s N(0, 1) + U(-s/4, s/4) per channel)` of the chosen one's
    frames, drawn anew for every frame, so it flickers. The same encoder encodes both videos, so
    nothing else distinguishes them.
    """

    noise: float = Field(default=0.15, gt=0, le=1)
    """`s`, in units of the pixel range."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Sampling steps of the chosen video; the backbone's default if unset (the paper uses 25)."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Classifier-free guidance of the chosen video; the backbone's default if unset (7.5)."""

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Jitter a sample or the clip."""
        video = self.chosen_video(
            clip,
            model,
            generator,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )
        both = torch.cat([video, jitter(video, self.noise, generator)])
        return self.pair(model.encode_videos(both), clip)


def jitter(videos: Videos, noise: float, generator: Generator) -> Videos:
    """Noise on every pixel and a shift per channel, drawn anew for every frame."""
    batch, channels, frames, _, _ = videos.shape
    grain = noise * torch.randn(videos.shape, generator=generator)
    shift = torch.rand(batch, channels, frames, 1, 1, generator=generator) * 2 - 1
    return (videos + grain + noise / 4 * shift).clamp(0, 1)
