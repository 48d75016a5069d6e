"""Segment-level pairs: two videos that share the structure of a real clip."""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from pydantic import Field, model_validator
from torch import Generator

from dpo_video.data.segments import SECONDS, preference
from dpo_video.errors import UserError
from dpo_video.strategies import Labeler, PairBuilder, VideoModel
from dpo_video.types import Clip, Pair


@final
class Dense(PairBuilder):
    """DenseDPO: noises and denoises a real clip twice; a labeler compares the two per segment.

    StructuralDPO of Wu et al. 2025, arXiv 2506.03517: both videos share the clip's motion and one
    eta, drawn from a range per pair; their noises are independent. Without a labeler the pairs are
    unlabelled (preference 0), to be labelled by `dpo-video label`. The clip itself is not part of
    the pair: compared with it every sample is worse, and nothing is learnt (their finding).

    The clip is noised to a ratio of signal to noise of `(1 - eta) : eta`, as in flow matching, for
    every family: sampling starts at the first step with no more noise than that, and the clip is
    noised to the level that this step expects (`VideoModel.strength_at` and `sample`). An epsilon
    or v model has that ratio at an earlier timestep than `eta T`: for eta 0.75 at 569 of 1000
    (AnimateDiff) or 492 (CogVideoX-2B).
    """

    pairs_version: ClassVar[int] = 2

    eta: tuple[float, float] = (0.65, 0.8)
    """Range of a pair's noise level: signal to noise is `(1 - eta) : eta`."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Steps of the full schedule, of which those up to eta are run; the backbone's default if unset
    (the paper uses 40)."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Classifier-free guidance; the backbone's default if unset (the paper uses 8)."""
    seconds: float = Field(default=SECONDS, gt=0)
    """Length of the segments that a labeler compares."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        low, high = self.eta
        if not 0 < low <= high <= 1:
            raise ValueError(f"eta is a range with 0 < low <= high <= 1, not {low:g} to {high:g}")
        return self

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Noise and denoise the clip twice."""
        if clip.video is None:
            raise UserError("Pairs of kind 'dense' need real videos. Name them with --clips DIR.")
        low, high = self.eta
        eta = low + (high - low) * torch.rand((), generator=generator).item()
        noises = torch.randn(2, *model.latent_shape, generator=generator)
        video = model.encode_videos(clip.video[None])
        first, second = model.sample(
            model.encode_prompts([clip.caption] * 2),
            noises.to(video),
            clean=video.expand_as(noises),
            strength=model.strength_at(eta, self.num_inference_steps),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        ).cpu()
        label = torch.zeros(first.shape[1])
        if labeler is not None:
            label = preference(labeler, model, clip.caption, first, second, self.seconds)
        return Pair(
            first=first,
            second=second,
            preference=label,
            region=torch.ones(1, *first.shape[1:]),
            prompt=clip.caption,
            source=clip.name,
            strength=eta,
        )
