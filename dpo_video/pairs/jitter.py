"""Clip-level pairs: a video and the same video with noise on every frame."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Generator

from dpo_video.pairs._chosen import OWN_SAMPLE, Chosen, chosen_video
from dpo_video.strategies import Labeler, PairBuilder, VideoModel
from dpo_video.types import Clip, Pair, Videos


@final
class Jitter(PairBuilder):
    """Video-DPO's noise injection: adds noise and a colour shift to every frame.

    The rejected video is `clip01(frame + s N(0, 1) + U(-s/4, s/4) per channel)` of the chosen one's
    frames, drawn anew for every frame, so it flickers. The same encoder encodes both videos, so
    nothing else distinguishes them.
    """

    asks_labeler: ClassVar[bool] = False

    chosen: Chosen = "sample"
    """The model's own sample of the prompt, or the real clip."""
    noise: float = Field(default=0.15, gt=0, le=1)
    """`s`, in units of the pixel range."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Sampling steps of the chosen video; the backbone's default if unset (the paper uses 25)."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Classifier-free guidance of the chosen video; the backbone's default if unset (7.5)."""

    @property
    def needs_video(self) -> bool:
        """Only if the real clip is chosen."""
        return self.chosen == "clip"

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Jitter a sample or the clip."""
        video = chosen_video(
            self.chosen,
            clip,
            model,
            generator,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )
        both = torch.cat([video, jitter(video, self.noise, generator)])
        chosen, rejected = model.encode_videos(both).cpu()
        frames = chosen.shape[1]
        return Pair(
            first=chosen,
            second=rejected,
            preference=torch.ones(frames),
            region=torch.ones(1, *chosen.shape[1:]),
            prompt=clip.caption,
            source=clip.name if self.chosen == "clip" else OWN_SAMPLE,
        )


def jitter(videos: Videos, noise: float, generator: Generator) -> Videos:
    """Noise on every pixel and a shift per channel, drawn anew for every frame."""
    batch, channels, frames, _, _ = videos.shape
    grain = noise * torch.randn(videos.shape, generator=generator)
    shift = torch.rand(batch, channels, frames, 1, 1, generator=generator) * 2 - 1
    return (videos + grain + noise / 4 * shift).clamp(0, 1)
