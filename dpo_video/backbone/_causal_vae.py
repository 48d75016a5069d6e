"""Latent frames of a causal VAE: one for the first frame, and one for every four after it."""

from __future__ import annotations

STRIDE = 4


def latent_count(frames: int) -> int:
    """Number of latent frames of a video."""
    return (frames - 1) // STRIDE + 1


def latent_frames(segment: slice, frames: int, padding: int = 0) -> slice:
    """The latent frames of a slice of pixel frames: 0 is frame 0, and k the frames 4k - 3 to 4k.

    Args:
        segment: Of the pixel frames.
        frames: Of the video.
        padding: Latent frames before the video's; they belong to frame 0.
    """
    start, stop, _ = segment.indices(frames)
    first = -(-start // STRIDE) + padding if start else 0
    return slice(first, -(-(stop - 1) // STRIDE) + 1 + padding)
