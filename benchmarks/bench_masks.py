"""Drawing LocalDPO's regions; baseline: drawing the same number of random elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.support.rounds import Measure
from dpo_video.pairs._masks import draw_region

SHAPES = {
    "tiny, 16x16x16 latents of 64x64": ((16, 16, 16), (64, 64)),
    "AnimateDiff, 16x64x64 latents of 512x512": ((16, 64, 64), (512, 512)),
    "Wan, 21x60x104 latents of 480x832": ((21, 60, 104), (480, 832)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.candidates("draw_region", "random elements")
def test_region(measure: Measure, candidate: str, shape: str, quick: bool) -> None:
    latents, pixels = SHAPES[shape]
    count = 2 if quick else 20

    def ours() -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            draw_region(latents, pixels, generator)

    def theirs() -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            (torch.rand(1, latents[0], *pixels, generator=generator) < 0.1).float()

    calls: dict[str, Callable[[], None]] = {"draw_region": ours, "random elements": theirs}
    measure(
        f"regions for {shape}", calls[candidate], unit="region", work=count,
        baseline="random elements",
    )  # fmt: skip
