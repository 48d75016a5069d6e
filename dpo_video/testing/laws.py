"""Assertions and comparisons that the contracts share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec

import torch
from torch import Tensor

from dpo_video.errors import UserError
from dpo_video.text import one_line
from dpo_video.types import Pair

Given = ParamSpec("Given")


def contract(check: Callable[Given, None]) -> Callable[Given, None]:
    """Turn whatever a strategy raises while it is checked into an AssertionError with a sentence.

    A UserError, such as a missing key of an API, is left as it is.
    """

    @functools.wraps(check)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> None:
        try:
            check(*args, **kwargs)
        except (AssertionError, UserError):
            raise
        except Exception as error:
            name = type(next(iter((*args, *kwargs.values())))).__name__
            raise AssertionError(
                f"{name} fails on the inputs of its contract "
                f"({one_line(f'{type(error).__name__}: {error}')}). The traceback above says where."
            ) from error

    return checked


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
