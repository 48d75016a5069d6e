"""Every built-in loss, forward and backward; baseline: the mean squared errors it is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.support.rounds import Measure
from dpo_video import registry
from dpo_video.strategies import Loss
from dpo_video.types import PairErrors

NAMES = sorted(
    listing.name
    for listing in registry.listings("loss")
    if listing.distribution.startswith("dpo-video ")
)
PLAIN = "means of the errors"


@cache
def errors(shape: tuple[int, ...], device: torch.device) -> PairErrors:
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    frames = shape[2]
    region = torch.zeros(shape[0], 1, *shape[2:], device=device)
    region[..., : shape[-1] // 3] = 1
    one = torch.ones(shape[0], device=device)
    return PairErrors(
        policy_first=drawn().requires_grad_(),
        policy_second=drawn().requires_grad_(),
        reference_first=drawn(),
        reference_second=drawn(),
        policy_product=drawn(),
        preference=torch.ones(shape[0], frames, device=device),
        region=region,
        strength=torch.full((shape[0],), 0.8, device=device),
        **dict.fromkeys(("timestep", "signal", "noise", "progress"), one),
    )


def plain(of: PairErrors) -> Tensor:
    return sum(
        sign * each.mean(dim=(1, 2, 3, 4))
        for sign, each in zip(
            (1, -1, -1, 1),
            (of.policy_first, of.policy_second, of.reference_first, of.reference_second),
            strict=True,
        )
    )  # type: ignore[return-value]


@pytest.mark.candidates(*NAMES, PLAIN)
def test_loss(measure: Measure, candidate: str, quick: bool, device: torch.device) -> None:
    shape = (1, 4, 4, 8, 8) if quick else (1, 4, 16, 64, 64)
    given = errors(shape, device)
    call: Callable[[], Tensor]
    if candidate == PLAIN:
        call = lambda: plain(given)  # noqa: E731
    else:
        loss = registry.load("loss", candidate)()
        assert isinstance(loss, Loss)
        call = lambda: loss(given).loss  # noqa: E731

    def both_ways() -> None:
        torch.autograd.grad(call().sum(), [given.policy_first, given.policy_second])

    measure(
        f"loss of a pair, latents {'x'.join(map(str, shape[1:]))}", both_ways, unit="pair",
        baseline=PLAIN, calls=2 if quick else 20,
    )  # fmt: skip
