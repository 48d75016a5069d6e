from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from handmade import errors_of, gradients

from dpo_video.loss.global_ import Global
from dpo_video.loss.region import Region
from dpo_video.testing import random_errors, swapped
from dpo_video.training.objective import figures

LN2 = math.log(2)


def test_global_matches_a_hand_computed_example() -> None:
    # d(first) = 0.1 - 0.3 = -0.2, d(second) = 0.5 - 0.4 = 0.1: m = 0.1 - (-0.2) = 0.3.
    ones = torch.ones(1, 1, 2, 1, 1)
    errors = replace(
        errors_of([0.0, 0.0], [0.0, 0.0], [1.0, 1.0], product=0.05**0.5),
        policy_first=0.1 * ones,
        reference_first=0.3 * ones,
        policy_second=0.5 * ones,
        reference_second=0.4 * ones,
    )
    output = Global(beta=10)(errors)
    derived = figures(Global(beta=10), errors)
    assert derived.logits.item() == pytest.approx(3.0)
    assert derived.gradient_factor.item() == pytest.approx(1 / (1 + math.exp(3.0)))
    assert output.margin.item() == pytest.approx(0.3)
    assert output.loss.item() == pytest.approx(math.log(1 + math.exp(-3)))
    assert output.chosen_change.item() == pytest.approx(-0.2)
    assert output.rejected_change.item() == pytest.approx(0.1)


@pytest.mark.parametrize("loss", [Global(), Region()])
def test_swapping_the_videos_flips_the_margin(loss: Global | Region) -> None:
    errors = random_errors(full_region=False)
    torch.testing.assert_close(loss(errors).margin, -loss(swapped(errors)).margin)


@pytest.mark.parametrize("loss", [Global(), Region()])
def test_swapping_videos_and_preference_changes_nothing(loss: Global | Region) -> None:
    errors = random_errors(full_region=False)
    mirrored = replace(swapped(errors), preference=-errors.preference)
    torch.testing.assert_close(loss(errors).loss, loss(mirrored).loss, rtol=0, atol=0)


def test_equal_networks_give_ln_2_exactly() -> None:
    errors = random_errors()
    same = replace(
        errors, policy_first=errors.reference_first, policy_second=errors.reference_second
    )
    output = Global()(same)
    assert (output.margin == 0).all()
    torch.testing.assert_close(output.loss, torch.full((3,), LN2), rtol=0, atol=1e-7)


def region_alone(**options: float) -> Region:
    zero = {"global_weight": 0.0, "sft_weight": 0.0, "region_sft_weight": 0.0}
    return Region(**{**zero, **options})  # type: ignore[arg-type]


def test_region_with_a_full_mask_equals_global() -> None:
    errors = random_errors()  # strength 0.75: the scale is 1
    torch.testing.assert_close(region_alone()(errors).loss, Global()(errors).loss)


def test_region_without_elements_is_ln_2_and_has_no_gradient() -> None:
    errors = random_errors()
    policy = errors.policy_first.clone().requires_grad_()
    empty = replace(errors, policy_first=policy, region=torch.zeros_like(errors.region))
    output = region_alone()(empty)
    torch.testing.assert_close(output.loss, torch.full((3,), LN2))
    output.loss.sum().backward()
    assert policy.grad is not None and (policy.grad == 0).all()


def test_region_does_not_see_outside_the_mask() -> None:
    errors = random_errors(full_region=False)
    policy = errors.policy_first.clone().requires_grad_()
    region_alone(beta=1.0)(replace(errors, policy_first=policy)).loss.sum().backward()
    assert policy.grad is not None
    inside = errors.region.expand_as(policy) > 0
    assert (policy.grad[~inside] == 0).all()
    assert (policy.grad[inside] != 0).all()


def test_masked_error_is_a_mean_per_pair_not_over_the_batch() -> None:
    errors = random_errors(full_region=False)
    alone = [region_alone()(errors.rows(slice(i, i + 1))).loss for i in range(3)]
    torch.testing.assert_close(region_alone()(errors).loss, torch.cat(alone))


def test_the_region_slope_grows_with_the_strength() -> None:
    errors = random_errors(full_region=False)
    strong = replace(errors, strength=torch.full((3,), 0.90))
    weak, scaled = figures(region_alone(), errors), figures(region_alone(), strong)
    torch.testing.assert_close(scaled.logits, 2 * weak.logits)
    unscaled = figures(region_alone(scale_by_strength=False), strong)
    torch.testing.assert_close(unscaled.logits, weak.logits)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.6, 0.7])
def test_below_the_authors_strengths_the_slope_stays_as_it_is(strength: float) -> None:
    # 1 + (strength - 0.75) / 0.15 is 0 at 0.6 and -4 at 0, where training would be turned round:
    # a mask of one's own comes with a strength of 0.
    errors = random_errors(full_region=False)
    weak = replace(errors, strength=torch.full((3,), strength))
    torch.testing.assert_close(region_alone()(weak).loss, region_alone()(errors).loss)


def test_region_by_hand() -> None:
    # Three frames of one element, of which the mask has the first two. d(first) = (-0.1, -0.3, 0),
    # d(second) = (0, 0.2, 0.6): over all m = 0.8/3 + 0.4/3 = 0.4, inside m = 0.1 + 0.2 = 0.3.
    # At strength 0.9 the region's slope is twice beta = ln 3 / 0.6, so inside z = ln 3, and outside
    # z = 2/3 ln 3, where sigmoid(-z) = 1 / (1 + 3^(2/3)). The policy's errors are 1 everywhere, so
    # the SFT terms add 0.1 and, at that strength, 2 * 0.1 inside.
    beta, q = math.log(3) / 0.6, 1 / (1 + 3 ** (2 / 3))
    errors = replace(
        errors_of([-0.1, -0.3, 0.0], [0.0, 0.2, 0.6], [1.0, 1.0, 1.0]),
        region=torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 3, 1, 1),
        strength=torch.tensor([0.9]),
    )
    loss = Region(beta=beta)
    assert loss(errors).loss.item() == pytest.approx(-math.log(1 - q) + math.log(4 / 3) + 0.3)
    # Per element: the global term gives beta q / 3, the region's 2 beta / 4 / 2 inside the mask,
    # the SFT terms 0.1 / 3 and 2 * 0.1 / 2 to the chosen video.
    everywhere, inside = beta * q / 3, beta / 4
    first, second = gradients(loss, errors)
    assert first.flatten().tolist() == pytest.approx(
        [everywhere + inside + 0.1 / 3 + 0.1] * 2 + [everywhere + 0.1 / 3]
    )
    assert second.flatten().tolist() == pytest.approx([-everywhere - inside] * 2 + [-everywhere])


def test_the_composite_is_the_weighted_sum() -> None:
    errors = random_errors(full_region=False)
    chosen = errors.policy_first
    masked = torch.stack(
        [c[:, r[0] > 0].mean() for c, r in zip(chosen, errors.region, strict=True)]
    )
    expected = (
        2 * Global()(errors).loss
        + 3 * region_alone()(errors).loss
        + 0.5 * chosen.mean(dim=(1, 2, 3, 4))
        + 0.25 * masked
    )
    loss = Region(global_weight=2, region_weight=3, sft_weight=0.5, region_sft_weight=0.25)
    torch.testing.assert_close(loss(errors).loss, expected)


def test_a_tie_trains_nothing() -> None:
    errors = random_errors()
    policy = errors.policy_first.clone().requires_grad_()
    tie = replace(errors, policy_first=policy, preference=torch.tensor([[1.0, -1, 1, -1]] * 3))
    for loss in (Global(), Region()):
        policy.grad = None
        output = loss(tie)
        output.loss.sum().backward()
        assert (output.margin == 0).all()
        assert policy.grad is not None and (policy.grad == 0).all()
