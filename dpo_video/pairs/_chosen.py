"""Pairs whose rejected video is derived from the chosen one: a sample of the model or a clip."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Generator

from dpo_video.data.prompts import negative_option
from dpo_video.errors import UserError
from dpo_video.strategies import PairBuilder, VideoModel
from dpo_video.types import Clip, Latents, Pair, Videos

OWN_SAMPLE = "own sample"  # `Pair.source` of a pair without a clip


class FromChosen(PairBuilder):
    """Base of builders that derive the rejected video from the chosen one."""

    asks_labeler: ClassVar[bool] = False

    chosen: Literal["sample", "clip"] = "sample"
    """The model's own sample of the prompt, or the real clip."""

    @property
    def needs_video(self) -> bool:
        """Only if the real clip is chosen."""
        return self.chosen == "clip"

    def chosen_video(
        self, clip: Clip, model: VideoModel, generator: Generator, **sampling: Any
    ) -> Videos:
        """The chosen video as a batch of one, on the CPU; `sampling` applies to a sample only.

        Raises:
            UserError: if the real clip is chosen and `clip` has no video.
        """
        if self.chosen == "clip":
            if clip.video is None:
                raise UserError(
                    "pairs.chosen=clip needs real clips. Name videos with --clips DIR, or choose "
                    "the model's samples with --set pairs.chosen=sample."
                )
            return clip.video[None]
        noise = torch.randn(model.latent_shape, generator=generator)[None]
        context = model.encode_prompts([clip.caption])
        sampling = {**sampling, **negative_option(clip.negative_prompt)}
        latents = model.sample(context, noise, **sampling)
        return model.decode_videos(latents).cpu()

    def pair(self, both: Latents, clip: Clip, strength: float = 0.0) -> Pair:
        """The pair of a chosen and a rejected video, everywhere different."""
        chosen, rejected = both.cpu()
        return Pair(
            first=chosen,
            second=rejected,
            preference=torch.ones(chosen.shape[1]),
            region=torch.ones(1, *chosen.shape[1:]),
            prompt=clip.caption,
            source=clip.name if self.chosen == "clip" else OWN_SAMPLE,
            strength=strength,
        )
