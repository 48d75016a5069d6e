"""Labels of segments on latent frames: the majority of a latent frame's pixel frames decides."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dpo_video.backbone import _causal_vae
from dpo_video.data.segments import broadcast, latent_parts, split
from dpo_video.types import VideoShape


@pytest.mark.parametrize(
    ("frames", "fps", "padding", "owners"),
    [
        (49, 8, 0, [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),  # CogVideoX-2B
        (81, 16, 0, [0] * 5 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4),  # Wan
        (81, 16, 1, [0] * 6 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4),  # CogVideoX1.5
    ],
)
def test_the_majority_of_a_latent_frame_decides(
    frames: int, fps: int, padding: int, owners: list[int]
) -> None:
    shape = VideoShape(frames=frames, height=8, width=8, fps=fps)
    model = SimpleNamespace(
        latent_shape=(4, len(owners), 1, 1),
        latent_frames=lambda part: _causal_vae.latent_frames(part, frames, padding),
    )
    segments = split(shape)
    parts = latent_parts.__wrapped__(model, segments)
    labels = torch.arange(len(segments)).float()
    assert broadcast(labels, parts, len(owners)).tolist() == owners


def test_an_even_split_goes_to_the_earlier_segment() -> None:
    model = SimpleNamespace(
        latent_shape=(4, 3, 1, 1), latent_frames=lambda part: _causal_vae.latent_frames(part, 9)
    )
    # Latent frame 1 has the pixel frames 1 to 4, of which 1 and 2 are in the first segment.
    assert latent_parts.__wrapped__(model, [slice(0, 3), slice(3, 9)]) == [slice(0, 2), slice(2, 3)]
