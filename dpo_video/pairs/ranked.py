"""Pairs of Diffusion-DPO: the best and the worst of several samples of a prompt."""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Generator

from dpo_video.data.prompts import negative_option
from dpo_video.data.segments import SECONDS, check_labels, split
from dpo_video.errors import UserError
from dpo_video.pairs._chosen import OWN_SAMPLE
from dpo_video.registry.returned import decoded
from dpo_video.strategies import Labeler, PairBuilder, VideoModel
from dpo_video.types import Clip, Pair, Videos


@final
class Ranked(PairBuilder):
    """Diffusion-DPO: a labeler ranks several samples of a prompt; the best and worst are the pair.

    Wallace et al. 2023, arXiv 2311.12908. DenseDPO (arXiv 2506.03517) calls it vanilla DPO and
    finds that it favours slow videos: the two samples share only the prompt, and the one that moves
    less has fewer flaws.

    The labeler compares every two samples segment by segment; the majority of the segments decides
    the comparison. Samples are ordered by comparisons won less comparisons lost, then by the sum of
    their segments' labels, then by the order of drawing. If best and worst are equal in both
    numbers, the pair is a tie (preference 0).
    """

    needs_labeler: ClassVar[bool] = True

    samples: int = Field(default=4, ge=2)
    """Samples per prompt; n samples take n (n - 1) / 2 comparisons."""
    keep: Literal["ends", "all"] = "ends"
    """ends: keep the best and the worst sample. all: keep every sample with its rank, for the loss
    `group`; all other losses compare the best with the worst."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Sampling steps; the backbone's default if unset."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Classifier-free guidance; the backbone's default if unset."""
    seconds: float = Field(default=SECONDS, gt=0)
    """Length of the segments that the labeler compares."""

    @property
    def needs_video(self) -> bool:
        """A prompt is enough."""
        return False

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Draw samples, compare them by the labeler, and keep the best and the worst, or all."""
        if labeler is None:
            raise UserError(
                "Pairs of kind 'ranked' need a labeler. Choose one with --labeler NAME (see "
                "`dpo-video list labeler`)."
            )
        noises = torch.randn(self.samples, *model.latent_shape, generator=generator)
        context = model.encode_prompts([clip.caption])
        # One at a time, so that memory does not grow with their number.
        latents = [
            model.sample(
                context,
                noise[None],
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                **negative_option(clip.negative_prompt),
            )
            for noise in noises
        ]
        videos = torch.cat([decoded(model, one).cpu() for one in latents])
        scores = rank(videos, clip.caption, labeler, split(model.shape, self.seconds))
        order = sorted(range(self.samples), key=lambda sample: scores[sample], reverse=True)
        best, worst = order[0], order[-1]
        first, second = latents[best][0].cpu(), latents[worst][0].cpu()
        decided = scores[best] != scores[worst]
        levels = sorted(set(scores), reverse=True)
        group = self.keep == "all" and self.samples > 2
        return Pair(
            first=first,
            second=second,
            preference=torch.full((first.shape[1],), float(decided)),
            region=torch.ones(1, *first.shape[1:]),
            prompt=clip.caption,
            source=OWN_SAMPLE,
            between=torch.cat([latents[n].cpu() for n in order[1:-1]]) if group else None,
            ranks=[levels.index(scores[n]) for n in order] if group else (),
        )


def rank(
    videos: Videos, prompt: str, labeler: Labeler, segments: list[slice]
) -> list[tuple[int, float]]:
    """Per video, comparisons won less comparisons lost, and the sum of its segments' labels."""
    won, total = [0] * len(videos), [0.0] * len(videos)
    for one, other in combinations(range(len(videos)), 2):
        arguments = [prompt], videos[one : one + 1], videos[other : other + 1], segments
        labels = check_labels(labeler, labeler(*arguments), len(segments))[0]
        majority, summed = int(labels.sign().sum().sign()), labels.sum().item()
        won[one] += majority
        won[other] -= majority
        total[one] += summed
        total[other] -= summed
    # Rounded, so that the order of summation does not change a score.
    return [(comparisons, round(labels, 6)) for comparisons, labels in zip(won, total, strict=True)]
