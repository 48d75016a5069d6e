"""Plackett-Luce over groups: computed by hand, and `global` on pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from handmade import errors_of

from dpo_video.loss.global_ import Global
from dpo_video.loss.group import Group
from dpo_video.testing import random_errors, swapped
from dpo_video.training.objective import figures
from dpo_video.types import GroupErrors, PairErrors


def group_of(changes: Sequence[float], ranks: Sequence[float]) -> PairErrors:
    """One group with one frame of one element, the best sample first; `d` of every sample."""
    best, *between, worst = changes
    ones = torch.ones(1, len(between), 1, 1, 1, 1)
    below = torch.tensor(between).view(ones.shape)
    return replace(
        errors_of([best], [worst], [1.0]),
        between=GroupErrors(policy=ones, reference=ones - below, ranks=torch.tensor([ranks])),
    )


def test_on_pairs_it_is_the_loss_global() -> None:
    errors = random_errors(change=1e-3)
    one, other = Group(sft_weight=0.3)(errors), Global(sft_weight=0.3)(errors)
    assert all(torch.equal(value, vars(other)[name]) for name, value in vars(one).items())


def test_three_samples_by_hand() -> None:
    # At a slope of 10, log(e_j / e_k) = 10 (d_k - d_j): -2 and -3 for the best sample, -1 for the
    # next one.
    errors = group_of([-0.2, 0.0, 0.1], [0.0, 1.0, 2.0])
    best, next_ = (math.log(1 + sum(map(math.exp, each))) for each in ([-2, -3], [-1]))
    output = Group(beta=10)(errors)
    assert output.loss.item() == pytest.approx(best + next_)
    assert output.margin.item() == pytest.approx(0.3)
    # Samples of one rank are not compared: the second one has none below it.
    assert Group(beta=10)(group_of([-0.2, 0.0, 0.1], [0.0, 1.0, 1.0])).loss.item() == (
        pytest.approx(best)
    )
    tied = group_of([-0.2, 0.0, 0.1], [0.0, 0.0, 1.0])
    expected = math.log(1 + math.exp(-3)) + next_
    assert Group(beta=10)(tied).loss.item() == pytest.approx(expected)


def test_equal_networks_give_the_logarithm_of_the_number_of_orders() -> None:
    same = group_of([0.0] * 4, [0.0, 1.0, 2.0, 3.0])
    assert Group()(same).loss.item() == pytest.approx(math.log(24))
    found = figures(Group(), same)
    assert found.margin.item() == 0 and found.gradient_factor.item() == pytest.approx(0.5)


def test_the_rejected_video_may_be_stored_first() -> None:
    errors = group_of([-0.2, 0.0, 0.1], [0.0, 1.0, 2.0])
    mirrored = replace(swapped(errors), preference=-errors.preference)
    assert torch.equal(Group(beta=10)(mirrored).loss, Group(beta=10)(errors).loss)


def test_a_group_of_ties_has_no_gradient() -> None:
    errors = group_of([-0.2, 0.0, 0.1], [0.0, 0.0, 0.0])
    policy = errors.policy_first.clone().requires_grad_()
    loss = Group()(replace(errors, policy_first=policy)).loss
    loss.sum().backward()
    assert loss.item() == 0 and policy.grad is not None and (policy.grad == 0).all()
