"""What a reader of the fuzz campaign is, and the small model and store that readers need."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from dpo_video.types import Pair
from tests.small_animatediff import SHAPE, load_small

Damage = Callable[[Random, bytes, list[bytes]], bytes]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A reader, valid inputs, and how to damage them."""

    seeds: list[bytes]
    damage: Damage
    read: Callable[[bytes], object]
    file: bool = True
    """Whether the bytes are put into a file, which may be something else then."""


class Bench:
    """A folder, a small model and a store of its pairs, which the readers need."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        from dpo_video.data.store import Manifest, PairStore

        self.folder = folder
        self.checkpoint = checkpoint
        self.model = load_small(checkpoint)
        manifest = Manifest(
            recipe={"pairs": {"name": "local"}, "seed": 0},
            identity=self.model.identity,
            latent_shape=self.model.latent_shape,
            fps=SHAPE.fps,
        )
        self.store = PairStore.create(folder / "store", manifest)
        generator = torch.Generator().manual_seed(0)
        for i in range(3):
            first, second = torch.randn(2, *self.model.latent_shape, generator=generator)
            pair = Pair(
                first=first, second=second, preference=torch.ones(self.model.latent_shape[1]),
                region=torch.ones(1, *self.model.latent_shape[1:]), prompt=f"a square {i}",
                source=f"clip {i}", strength=0.8,
            )  # fmt: skip
            self.store.append(pair, self.model.encode_prompts([pair.prompt]))
        self.video = torch.rand(3, SHAPE.frames, SHAPE.height, SHAPE.width, generator=generator)


def json_lines(lines: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
