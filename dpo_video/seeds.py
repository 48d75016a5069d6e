"""Randomness by name: every draw has a generator of its own, whatever ran before it.

A resumed, sharded or reordered run therefore draws what an unbroken one draws.
"""

from __future__ import annotations

import hashlib

from torch import Generator


def derive(*parts: int | str) -> int:
    """A seed in [0, 2^63) for the draw that `parts` name, e.g. `derive(seed, "pair", 3)`."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> Generator:
    """A CPU generator for the draw that `parts` name."""
    return Generator().manual_seed(derive(*parts))
