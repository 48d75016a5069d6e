"""Assertions and comparisons that the contracts share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dpo_video.types import Pair


def law(holds: Any, sentence: str) -> None:
    """Raise an AssertionError with the sentence unless the law holds."""
    if not holds:
        raise AssertionError(sentence)


@contextmanager
def pure(name: str, *inputs: Tensor) -> Iterator[None]:
    """Check that the block neither writes to the inputs nor draws from the global generator."""
    copies = [value.detach().clone() for value in inputs]
    state = torch.get_rng_state()
    yield
    law(
        all(torch.equal(value, copy) for value, copy in zip(inputs, copies, strict=True)),
        f"{name} writes to its inputs. Work on copies.",
    )
    law(
        torch.equal(state, torch.get_rng_state()),
        f"{name} draws from torch's global generator. A resumed run would not repeat it.",
    )


def same(one: Pair, other: Pair) -> bool:
    """Whether two pairs are equal to the bit."""
    parts = ("first", "second", "preference", "region")
    return all(torch.equal(vars(one)[part], vars(other)[part]) for part in parts)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether all values agree to a relative tolerance, or to a hundredth of it near 0."""
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance / 100)


def in_unit(pixels: Tensor) -> bool:
    """Whether all pixels are in [0, 1]."""
    return bool(pixels.min() >= 0 and pixels.max() <= 1)
