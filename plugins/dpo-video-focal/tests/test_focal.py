"""Tests of the installed package: run `pytest` in this folder."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from dpo_video_focal import Focal

from dpo_video.loss.global_ import Global
from dpo_video.testing import check_loss, random_errors, swapped
from dpo_video.training.objective import figures


def test_it_keeps_the_contract() -> None:
    check_loss(Focal())
    check_loss(Focal(gamma=1.0))


def test_without_focus_it_is_clip_level_dpo() -> None:
    errors = random_errors(change=1e-4)
    torch.testing.assert_close(Focal(gamma=0)(errors).loss, Global()(errors).loss)


def test_a_policy_that_equals_its_reference_is_worth_half_to_the_gamma_times_ln_2() -> None:
    errors = random_errors(change=0.0)
    expected = 0.5**0.3 * math.log(2)
    assert Focal(gamma=0.3)(errors).loss.tolist() == pytest.approx([expected] * 3)


def test_the_gradient_factor_is_that_of_this_loss_and_not_of_dpo() -> None:
    # At gamma 1 and beta m = 2, DPO's factor is sigmoid(-2) = 0.119. This loss is p (-log p), with
    # the slope p (1 + log p) sigmoid(-z): half of its slope at 2 over that at 0 is 0.597.
    errors = random_errors(pairs=1, change=0.0)
    moved = replace(errors, policy_second=errors.reference_second + 2 / 2500)
    assert figures(Global(), moved).gradient_factor.item() == pytest.approx(0.119, abs=1e-3)
    assert figures(Focal(gamma=1), moved).gradient_factor.item() == pytest.approx(0.597, abs=1e-3)


def test_a_pair_ranked_wrong_pulls_less_beside_one_ranked_right() -> None:
    def pulls(loss: Focal) -> tuple[float, float]:
        """Slope on the margin of a pair ranked right, and of its mirror image."""
        errors = random_errors(pairs=1, change=1e-3)
        right = errors if Global()(errors).margin > 0 else swapped(errors)
        slopes = []
        for pair in (right, swapped(right)):
            policy = pair.policy_second.clone().requires_grad_()
            loss(replace(pair, policy_second=policy)).loss.sum().backward()
            assert policy.grad is not None
            slopes.append(policy.grad.sum().abs().item())
        return slopes[0], slopes[1]

    dpo, focal = pulls(Focal(gamma=0)), pulls(Focal(gamma=0.5))
    assert focal[1] / focal[0] < dpo[1] / dpo[0]
