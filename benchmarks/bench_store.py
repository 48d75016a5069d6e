"""Reading pairs in random order, beside the same tensors in other files.

Each contestant reads latents, preference, region and the encoded prompt of one pair after another.
`raw safetensors` opens the store's own files and checks nothing. The `.pt` files are one a pair, as
Video-DPO publishes them: the encoded prompt is in each. All files are in the system's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Turn
from safetensors.torch import load_file

from dpo_video.store import Manifest, PairStore
from dpo_video.types import Pair

SHAPE = (4, 8, 8, 8)
PROMPTS = 8  # cycled, as Video-DPO's are
TOKENS = (16, 64)


@pytest.fixture(scope="module")
def pairs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PairStore, Path]]:
    """A store, and a folder of .pt files with the same pairs."""
    count = 20 if request.config.getoption("--quick") else 10_000
    folder = tmp_path_factory.mktemp("store")
    patch = pytest.MonkeyPatch()
    patch.setattr("os.fsync", lambda _: None)  # writing is not what is timed
    manifest = Manifest(recipe={}, identity="none", latent_shape=SHAPE, fps=8.0)
    store = PairStore.create(folder / "pairs", manifest)
    (folder / "pt").mkdir()
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randn(PROMPTS, 1, *TOKENS, generator=generator)
    for index in range(count):
        first, second = torch.randn(2, *SHAPE, generator=generator)
        pair = Pair(
            first=first, second=second, preference=torch.ones(SHAPE[1]),
            region=torch.ones(1, *SHAPE[1:]), prompt=f"prompt {index % PROMPTS}", source="random",
        )  # fmt: skip
        context = contexts[index % PROMPTS].clone()
        store.append(pair, {"prompt_embeds": context})
        torch.save(
            {"first": first.clone(), "second": second.clone(), "preference": pair.preference,
             "region": pair.region, "prompt_embeds": context},
            folder / "pt" / f"pair_{index:05d}.pt",
        )  # fmt: skip
    patch.undo()
    yield store, folder / "pt"


@pytest.mark.contestants("PairStore.batch", "raw safetensors", "torch.load of .pt")
def test_read(turn: Turn, contestant: str, pairs: tuple[PairStore, Path]) -> None:
    store, folder = pairs
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(1)).tolist()
    latents, contexts = store.folder / "latents", store.folder / "contexts"

    def raw(index: int) -> Any:
        row = store.rows[index]
        return (
            load_file(latents / f"{index:05d}.safetensors"),
            load_file(contexts / f"{row.context}.safetensors"),
        )

    reads: dict[str, Callable[[int], Any]] = {
        "PairStore.batch": lambda index: store.batch([index]),
        "raw safetensors": raw,
        "torch.load of .pt": lambda index: torch.load(
            folder / f"pair_{index:05d}.pt", weights_only=True
        ),
    }
    read = reads[contestant]

    def all_of_them() -> None:
        for index in order:
            read(index)

    turn(
        f"reading {len(store):,} pairs of 2 x {'x'.join(map(str, SHAPE))}", all_of_them,
        unit="pair", work=len(store), yardstick="raw safetensors",
    )  # fmt: skip
