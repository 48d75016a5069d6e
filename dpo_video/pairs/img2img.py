"""Clip-level pairs: a video and the same video with every frame regenerated or re-noised alone."""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from pydantic import Field, model_validator
from torch import Generator

from dpo_video.data.prompts import negative_option
from dpo_video.pairs._chosen import FromChosen
from dpo_video.strategies import Labeler, VideoModel
from dpo_video.types import Clip, Pair


@final
class Img2Img(FromChosen):
    """Video-DPO's img2img on AnimateDiff; on CogVideoX and Wan, re-noised single latent frames.

    The frames of the rejected video are independent of each other, so it flickers. On AnimateDiff,
    `tiny` included, the image model regenerates every frame: the motion modules are bypassed, and
    noise and steps are those of the image checkpoint's own scheduler, as in diffusers'
    StableDiffusionImg2ImgPipeline. CogVideoX and Wan have no image model. There the video model
    noises and denoises every latent frame as a video of its own, which is an adaptation: a latent
    frame spans 4 frames of the video. Both videos are decoded and encoded again at the end, so only
    the regeneration distinguishes them.
    """

    pairs_version: ClassVar[int] = 2

    strength: float = Field(default=0.15, gt=0, le=1)
    """Share of the noise schedule that every frame is noised by, then denoised."""
    num_inference_steps: int = Field(default=20, ge=1)
    """Steps of the full schedule; the share `strength` of them is run, 3 of 20 by default. The
    scheduler of Stable Diffusion 1.5, PNDM, predicts once more."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Classifier-free guidance of the regeneration; the backbone's default if unset (the paper uses
    7.5)."""

    @model_validator(mode="after")
    def _runs_a_step(self) -> Self:
        if int(self.strength * self.num_inference_steps) < 1:
            raise ValueError(
                f"strength {self.strength:g} of {self.num_inference_steps} steps is less than one "
                "step; raise either"
            )
        return self

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Regenerate the frames of a sample or of the clip."""
        video = model.encode_videos(self.chosen_video(clip, model, generator))
        # Drawn elementwise, so every frame has its own noise.
        noise = torch.randn(model.latent_shape, generator=generator)[None]
        regenerated = model.sample(
            model.encode_prompts([clip.caption]),
            noise.to(video),
            clean=video,
            strength=self.strength,
            per_frame=True,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            **negative_option(clip.negative_prompt),
        )
        both = model.decode_videos(torch.cat([video, regenerated]))
        return self.pair(model.encode_videos(both), clip, self.strength)
