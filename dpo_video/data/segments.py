"""Segments of a video: the unit that DenseDPO labels (Wu et al. 2025, arXiv 2506.03517)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_video.registry.returned import checked, decoded
from dpo_video.strategies import Labeler, VideoModel
from dpo_video.types import Latents, VideoShape

SECONDS = 1.0  # as in the paper


def split(shape: VideoShape, seconds: float = SECONDS) -> list[slice]:
    """Segments of `seconds`, in pixel frames; a remainder under half a segment joins the last."""
    length = max(1, round(seconds * shape.fps))
    count = max(1, round(shape.frames / length))
    bounds = [i * length for i in range(count)] + [shape.frames]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def broadcast(
    labels: Float[Tensor, " s"], latents: Sequence[slice], frames: int
) -> Float[Tensor, " f"]:
    """Expand labels per segment to labels per latent frame.

    `latents` holds the latent frames of each segment (`latent_parts`).
    """
    preference = torch.zeros(frames)
    for label, part in zip(labels.tolist(), latents, strict=True):
        preference[part] = label
    return preference


def latent_parts(model: VideoModel, segments: Sequence[slice]) -> list[slice]:
    """The latent frames of each segment, without overlap.

    A latent frame of several pixel frames belongs to the segment that has most of them, and to the
    earlier one of two with equally many. A segment shorter than half a latent frame may have none.
    """
    counts = torch.zeros(model.latent_shape[1], len(segments))
    for index, segment in enumerate(segments):
        for frame in range(segment.start, segment.stop):
            counts[model.latent_frames(slice(frame, frame + 1)), index] += 1
    owners = [row.index(max(row)) for row in counts.tolist()]
    bounds = [sum(owner < index for owner in owners) for index in range(len(segments) + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def check_labels(labeler: Labeler, labels: Tensor, segments: int) -> Float[Tensor, "1 s"]:
    """The labels of one pair in fp32 on the CPU, after a check of what the labeler returned.

    Raises:
        PluginError: if they have another shape or leave [-1, 1].
    """
    checked(labeler, f"labels of {segments} segments", labels, (1, segments), within=(-1, 1))
    return labels.float().cpu()


def preference(
    labeler: Labeler,
    model: VideoModel,
    prompt: str,
    first: Float[Tensor, "c f h w"],
    second: Float[Tensor, "c f h w"],
    seconds: float = SECONDS,
) -> Float[Tensor, " f"]:
    """A labeler's preference between two videos' latents, per latent frame."""
    both: Latents = torch.stack([first, second]).to(model.device)
    videos = decoded(model, both).cpu()
    segments = split(model.shape, seconds)
    labels = labeler([prompt], videos[:1], videos[1:], segments)
    parts = latent_parts(model, segments)
    return broadcast(check_labels(labeler, labels, len(segments))[0], parts, first.shape[1])
