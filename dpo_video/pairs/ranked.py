"""Vanilla DPO's pairs: the best against the worst of several samples of a prompt."""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Generator

from dpo_video.data.segments import SECONDS, check_labels, split
from dpo_video.errors import UserError
from dpo_video.pairs._chosen import OWN_SAMPLE
from dpo_video.strategies import Labeler, PairBuilder, VideoModel
from dpo_video.types import Clip, Pair, Videos


@final
class Ranked(PairBuilder):
    """The model's best sample of a prompt against its worst, by a labeler's judgement.

    Diffusion-DPO's kind of pairs (Wallace et al. 2023, arXiv 2311.12908), which DenseDPO (arXiv
    2506.03517) calls vanilla DPO and finds to favour slow videos: the two share nothing but the
    prompt, and what moves less has fewer faults.

    Every sample meets every other. The labeler says segment by segment who is better, and the
    majority of the segments decides the meeting. Samples are ordered by meetings won less meetings
    lost; among equals by the sum of all their segments' labels; among equals still, the earlier
    drawn stands before. Where best and worst are equal in both numbers, the pair is a tie
    (preference 0).
    """

    needs_labeler: ClassVar[bool] = True

    samples: int = Field(default=4, ge=2)
    """How many are drawn for a prompt; n of them take n (n - 1) / 2 comparisons."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Sampling steps; the backbone's own number when not set."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Classifier-free guidance; the backbone's own when not set."""
    seconds: float = Field(default=SECONDS, gt=0)
    """Length of the segments that the labeler compares."""

    @property
    def needs_video(self) -> bool:
        """A prompt is enough."""
        return False

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Draw the samples, let the labeler compare them, and keep two."""
        if labeler is None:
            raise UserError(
                "Pairs of kind 'ranked' need somebody who ranks them. Choose with --labeler NAME "
                "(see `dpo-video list labeler`)."
            )
        noises = torch.randn(self.samples, *model.latent_shape, generator=generator)
        context = model.encode_prompts([clip.caption])
        # One at a time: their number must not decide whether they fit into memory.
        latents = [
            model.sample(
                context,
                noise[None],
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
            )
            for noise in noises
        ]
        videos = torch.cat([model.decode_videos(one).cpu() for one in latents])
        standing = rank(videos, clip.caption, labeler, split(model.shape, self.seconds))
        order = sorted(range(self.samples), key=lambda sample: standing[sample], reverse=True)
        best, worst = order[0], order[-1]
        first, second = latents[best][0].cpu(), latents[worst][0].cpu()
        decided = standing[best] != standing[worst]
        return Pair(
            first=first,
            second=second,
            preference=torch.full((first.shape[1],), float(decided)),
            region=torch.ones(1, *first.shape[1:]),
            prompt=clip.caption,
            source=OWN_SAMPLE,
        )


def rank(
    videos: Videos, prompt: str, labeler: Labeler, segments: list[slice]
) -> list[tuple[int, float]]:
    """Per video, meetings won less meetings lost, and the sum of its segments' labels."""
    won, total = [0] * len(videos), [0.0] * len(videos)
    for one, other in combinations(range(len(videos)), 2):
        asked = [prompt], videos[one : one + 1], videos[other : other + 1], segments
        labels = check_labels(labeler, labeler(*asked), len(segments))[0]
        majority, summed = int(labels.sign().sum().sign()), labels.sum().item()
        won[one] += majority
        won[other] -= majority
        total[one] += summed
        total[other] -= summed
    # Rounded: the same labels summed in another order are the same standing.
    return [(meetings, round(labels, 6)) for meetings, labels in zip(won, total, strict=True)]
