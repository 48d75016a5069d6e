"""Segments of a video: the unit that DenseDPO labels (Wu et al. 2025, arXiv 2506.03517)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_video.strategies import Labeler, VideoModel
from dpo_video.types import Latents, VideoShape

SECONDS = 1.0  # the paper's segment


def split(shape: VideoShape, seconds: float = SECONDS) -> list[slice]:
    """Pixel frames cut into segments of `seconds`; a rest under half a segment joins the last."""
    length = max(1, round(seconds * shape.fps))
    count = max(1, round(shape.frames / length))
    bounds = [i * length for i in range(count)] + [shape.frames]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def broadcast(
    labels: Float[Tensor, " s"], latents: Sequence[slice], frames: int
) -> Float[Tensor, " f"]:
    """One label a segment to one a latent frame; `latents` are the segments' latent frames.

    A latent frame that two segments share goes to the later one.
    """
    preference = torch.zeros(frames)
    for label, part in zip(labels.tolist(), latents, strict=True):
        preference[part] = label
    return preference


def preference(
    labeler: Labeler,
    model: VideoModel,
    prompt: str,
    first: Float[Tensor, "c f h w"],
    second: Float[Tensor, "c f h w"],
    seconds: float = SECONDS,
) -> Float[Tensor, " f"]:
    """What a labeler says of two videos' latents, per latent frame."""
    both: Latents = torch.stack([first, second]).to(model.device)
    videos = model.decode_videos(both).cpu()
    segments = split(model.shape, seconds)
    labels = labeler([prompt], videos[:1], videos[1:], segments)[0]
    parts = [model.latent_frames(segment) for segment in segments]
    return broadcast(labels.float().cpu(), parts, first.shape[1])
