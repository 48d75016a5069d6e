"""A small store of random pairs to label, and a labeler, shared by the tests of labelling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.store import Manifest, PairStore
from dpo_video.strategies import Labeler
from dpo_video.types import Pair

COUNT = 3


def random_store(
    folder: Path, model: AnimateDiffModel, count: int = COUNT, manifest: Manifest | None = None
) -> PairStore:
    manifest = manifest or Manifest(
        recipe={"made": "in a test"},
        identity=model.identity,
        latent_shape=model.latent_shape,
        fps=model.shape.fps,
    )
    store = PairStore.create(folder, manifest)
    for index in range(len(store), count):
        generator = torch.Generator().manual_seed(index)
        first, second = torch.randn(2, *model.latent_shape, generator=generator)
        frames = model.latent_shape[1]
        pair = Pair(
            first=first, second=second, preference=torch.ones(frames),
            region=torch.ones(1, *model.latent_shape[1:]), prompt=f"prompt {index}", source="none",
        )  # fmt: skip
        context = model.encode_prompts([pair.prompt])
        store.append(pair, {name: value.cpu() for name, value in context.items()})
    return store


class Brighter(Labeler):
    """Prefers the brighter video."""

    def __call__(
        self, prompts: Sequence[str], first: Tensor, second: Tensor, segments: Sequence[slice]
    ) -> Tensor:
        lead = (first - second).mean(dim=(1, 3, 4))
        return torch.stack([lead[:, part].mean(dim=1).sign() for part in segments], dim=1)
