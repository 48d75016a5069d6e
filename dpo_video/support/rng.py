"""Named random draws: each has its own generator, independent of what ran before.

A resumed, distributed or reordered run therefore draws the same values as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Generator


def derive(*parts: int | str) -> int:
    """Seed in [0, 2^63) of the draw named by `parts`, e.g. `derive(seed, "pair", 3)`."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> Generator:
    """CPU generator for the draw named by `parts`."""
    return Generator().manual_seed(derive(*parts))


def global_states() -> dict[str, Any]:
    """States of the global generators, which a backbone or a plugin may draw from."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss,
                  cached],
    }  # fmt: skip


def set_global_states(state: dict[str, Any]) -> None:
    """Restore the states that `global_states` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
