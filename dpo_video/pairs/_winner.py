"""The winner of pairs whose loser is made of it: the model's own sample, or a real clip."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator

from dpo_video.errors import UserError
from dpo_video.strategies import VideoModel
from dpo_video.types import Clip, Videos

Winner = Literal["sample", "clip"]
OWN_SAMPLE = "own sample"  # the source of a pair that is made of no clip


def winning_video(
    winner: Winner,
    clip: Clip,
    model: VideoModel,
    generator: Generator,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> Videos:
    """A batch of one, on the CPU; `steps` and `guidance` are those of a sample.

    Raises:
        UserError: if the clip is to win, and is a prompt alone.
    """
    if winner == "clip":
        if clip.video is None:
            raise UserError(
                "A real clip can only win where there is one. Name videos with --clips DIR, or let "
                "the model's samples win (--set pairs.winner=sample)."
            )
        return clip.video[None]
    noise = torch.randn(model.latent_shape, generator=generator)[None]
    context = model.encode_prompts([clip.caption])
    latents = model.sample(
        context, noise, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
    )
    return model.decode_videos(latents).cpu()
