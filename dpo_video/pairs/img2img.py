"""Clip-level pairs: a video against the same video with every frame regenerated alone."""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from pydantic import Field, model_validator
from torch import Generator

from dpo_video.pairs._winner import OWN_SAMPLE, Winner, winning_video
from dpo_video.strategies import Labeler, PairBuilder, VideoModel
from dpo_video.types import Clip, Pair


@final
class Img2Img(PairBuilder):
    """The loser's frames do not know each other: each is noised and denoised on its own.

    Video-DPO's second kind of pairs. Its loser comes from the image model that the video model was
    made of; here the video model itself sees one frame at a time. Both videos are decoded and
    encoded once more at the end, whatever they are, so that only the regeneration tells them apart.
    """

    asks_labeler: ClassVar[bool] = False

    winner: Winner = "sample"
    """The model's own sample of the prompt, at its own settings, or the real clip."""
    strength: float = Field(default=0.15, gt=0, le=1)
    """The share of the noise schedule that every frame is taken back by."""
    num_inference_steps: int = Field(default=20, ge=1)
    """Steps of the whole schedule, of which the share `strength` is run: 3 of 20."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Classifier-free guidance of the regeneration; the backbone's own when not set (7.5 in the
    paper)."""

    @model_validator(mode="after")
    def _runs_a_step(self) -> Self:
        if round(self.strength * self.num_inference_steps) < 1:
            raise ValueError(
                f"strength {self.strength:g} of {self.num_inference_steps} steps is less than "
                "one step; raise "
                "either"
            )
        return self

    @property
    def needs_video(self) -> bool:
        """Only when the real clip wins."""
        return self.winner == "clip"

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Regenerate the frames of a sample or of the clip."""
        video = model.encode_videos(winning_video(self.winner, clip, model, generator))
        # Drawn elementwise, so every frame has a noise of its own.
        noise = torch.randn(model.latent_shape, generator=generator)[None]
        regenerated = model.sample(
            model.encode_prompts([clip.caption]),
            noise.to(video),
            clean=video,
            strength=self.strength,
            per_frame=True,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )
        both = model.decode_videos(torch.cat([video, regenerated]))
        winner, loser = model.encode_videos(both).cpu()
        return Pair(
            first=winner,
            second=loser,
            preference=torch.ones(winner.shape[1]),
            region=torch.ones(1, *winner.shape[1:]),
            prompt=clip.caption,
            source=clip.name if self.winner == "clip" else OWN_SAMPLE,
            strength=self.strength,
        )
