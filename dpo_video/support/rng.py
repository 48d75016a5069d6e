"""Randomness by name: every draw has a generator of its own, whatever ran before it.

A resumed, sharded or reordered run therefore draws what an unbroken one draws.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Generator


def derive(*parts: int | str) -> int:
    """A seed in [0, 2^63) for the draw that `parts` name, e.g. `derive(seed, "pair", 3)`."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> Generator:
    """A CPU generator for the draw that `parts` name."""
    return Generator().manual_seed(derive(*parts))


def global_states() -> dict[str, Any]:
    """Every generator that a backbone or a plugin might draw from behind our back."""
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
    """Put the generators back to where `global_states` found them."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
