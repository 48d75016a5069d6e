"""A small store of random pairs to label, shared by the tests of labelling."""

from __future__ import annotations

from pathlib import Path

import torch

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.store import Manifest, PairStore
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
