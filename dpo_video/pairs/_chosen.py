"""The chosen video that a rejected one is derived from: a sample of the model or a real clip."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator

from dpo_video.errors import UserError
from dpo_video.strategies import VideoModel
from dpo_video.types import Clip, Videos

Chosen = Literal["sample", "clip"]
OWN_SAMPLE = "own sample"  # `Pair.source` of a pair that is made of no clip


def chosen_video(
    chosen: Chosen,
    clip: Clip,
    model: VideoModel,
    generator: Generator,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> Videos:
    """The chosen video as a batch of one, on the CPU; the sampling options apply to a sample only.

    Raises:
        UserError: if a real clip is asked for and `clip` has no video.
    """
    if chosen == "clip":
        if clip.video is None:
            raise UserError(
                "pairs.chosen=clip needs real clips. Name videos with --clips DIR, or choose the "
                "model's samples with --set pairs.chosen=sample."
            )
        return clip.video[None]
    noise = torch.randn(model.latent_shape, generator=generator)[None]
    context = model.encode_prompts([clip.caption])
    latents = model.sample(
        context, noise, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
    )
    return model.decode_videos(latents).cpu()
