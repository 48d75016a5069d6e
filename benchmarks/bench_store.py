"""Reading pairs in random order from the store and from other files.

Each candidate reads latents, preference, region and encoded prompt, one pair after another. `raw
safetensors` copies the store's files into memory without checks. The `.pt` files are one per pair,
as Video-DPO publishes them, each with its encoded prompt. All files are in the page cache.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.support.rounds import Measure
from dpo_video.data.store import Manifest, PairStore
from dpo_video.types import Pair


@dataclass(frozen=True)
class Size:
    """Size of a pair set."""

    count: int
    latents: tuple[int, int, int, int]
    prompt: tuple[int, int]
    """Tokens and channels of an encoded prompt."""
    dtype: torch.dtype = torch.float32
    """Dtype of the encoded prompts."""


SIZES = {
    "small pairs": Size(10_000, (4, 8, 8, 8), (16, 64)),
    "pairs of Wan2.1, 81 frames of 480x832": Size(
        12, (16, 21, 60, 104), (512, 4096), torch.bfloat16
    ),
}
PROMPTS = 8  # cycled, as in Video-DPO


@cache
def pairs(name: str, quick: bool) -> tuple[PairStore, Path]:
    """A store and a folder of .pt files with the same pairs."""
    size = SIZES[name]
    shape = size.latents
    folder = Path(tempfile.mkdtemp(prefix="dpo-video-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    manifest = Manifest(recipe={}, identity="none", latent_shape=shape, fps=8.0)
    store = PairStore.create(folder / "pairs", manifest)
    (folder / "pt").mkdir()
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randn(PROMPTS, 1, *size.prompt, generator=generator).to(size.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)  # writing is not timed
        for index in range(2 if quick else size.count):
            first, second = torch.randn(2, *shape, generator=generator)
            pair = Pair(
                first=first, second=second, preference=torch.ones(shape[1]),
                region=torch.ones(1, *shape[1:]), prompt=f"prompt {index % PROMPTS}",
                source="random",
            )  # fmt: skip
            context = contexts[index % PROMPTS].clone()
            store.append(pair, {"prompt_embeds": context})
            torch.save(
                {"first": first.clone(), "second": second.clone(), "preference": pair.preference,
                 "region": pair.region, "prompt_embeds": context},
                folder / "pt" / f"pair_{index:05d}.pt",
            )  # fmt: skip
    return store, folder / "pt"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.candidates("PairStore.batch", "raw safetensors", "torch.load of .pt")
def test_read(measure: Measure, candidate: str, size: str, quick: bool) -> None:
    store, folder = pairs(size, quick)
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(1)).tolist()
    latents, contexts = store.folder / "latents", store.folder / "contexts"

    def raw(index: int) -> Any:
        files = latents / f"{index:05d}", contexts / store.records[index].context
        return [
            # Cloning reads the memory-mapped file.
            {name: value.clone() for name, value in load_file(f"{file}.safetensors").items()}
            for file in files
        ]

    reads: dict[str, Callable[[int], Any]] = {
        "PairStore.batch": lambda index: store.batch([index]),
        "raw safetensors": raw,
        "torch.load of .pt": lambda index: torch.load(
            folder / f"pair_{index:05d}.pt", weights_only=True
        ),
    }
    read = reads[candidate]

    def read_all() -> None:
        for index in order:
            read(index)

    measure(
        f"reading {len(store):,} {size}", read_all, unit="pair", work=len(store),
        baseline="raw safetensors",
    )  # fmt: skip
