"""Small random pairs for tests of the store; a process that makes them imports little."""

from __future__ import annotations

import torch

from dpo_video.data.store import Manifest
from dpo_video.types import Context, Pair

SHAPE = (2, 4, 3, 3)
MANIFEST = Manifest(recipe={"seed": 0}, identity="0123", latent_shape=SHAPE, fps=8.0)


def random_pair(seed: int, prompt: str = "a red square") -> Pair:
    generator = torch.Generator().manual_seed(seed)
    first, other = torch.randn(2, *SHAPE, generator=generator)
    region = (torch.rand(1, *SHAPE[1:], generator=generator) < 0.5).float()
    return Pair(
        first=first,
        second=torch.where(region > 0, other, first),
        preference=torch.rand(SHAPE[1], generator=generator) * 2 - 1,
        region=region,
        prompt=prompt,
        source=f"clip {seed}",
        strength=0.75,
    )


def context_of(prompt: str) -> Context:
    generator = torch.Generator().manual_seed(len(prompt))
    return {"prompt_embeds": torch.randn(1, 5, 3, generator=generator)}
