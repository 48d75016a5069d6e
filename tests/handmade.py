"""Errors small enough to compute with on paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpo_video.strategies import Loss
from dpo_video.types import PairErrors


def errors_of(
    first: Sequence[float],
    second: Sequence[float],
    labels: Sequence[float],
    *,
    product: float = 0.0,
) -> PairErrors:
    """One pair with one element per frame: `d(first)`, `d(second)` and the label of every frame.

    The policy's errors are 1 everywhere; `product` is that of its signed errors.
    """
    shape = (1, 1, len(labels), 1, 1)
    ones = torch.ones(shape)
    changes = [torch.tensor(change).view(shape) for change in (first, second)]
    return PairErrors(
        policy_first=ones,
        policy_second=ones,
        reference_first=ones - changes[0],
        reference_second=ones - changes[1],
        policy_product=product * ones,
        preference=torch.tensor([labels]).float(),
        region=ones,
        strength=torch.zeros(1),
        timestep=torch.full((1,), 500.0),
        signal=torch.full((1,), 0.5),
        noise=torch.full((1,), 0.5),
        progress=torch.zeros(1),
    )


def gradients(loss: Loss, errors: PairErrors) -> tuple[Tensor, Tensor]:
    """Gradients of the summed loss on the policy's errors of the first and the second video."""
    policy = [
        value.clone().requires_grad_() for value in (errors.policy_first, errors.policy_second)
    ]
    output = loss(replace(errors, policy_first=policy[0], policy_second=policy[1]))
    first, second = torch.autograd.grad(output.loss.sum(), policy)
    return first, second
