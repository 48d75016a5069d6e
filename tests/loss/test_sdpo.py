from __future__ import annotations

from dataclasses import replace

import torch
from handmade import gradients
from torch import Tensor

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.loss.global_ import Global
from dpo_video.loss.sdpo import SDPO
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Loss
from dpo_video.testing import random_errors
from dpo_video.training.lora import adapt
from dpo_video.training.objective import pair_errors
from dpo_video.types import PairBatch, PairErrors


def dot(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))


def shared_weights(seed: int) -> tuple[Tensor, PairErrors]:
    """Errors of a network whose output on either video is its input plus its weights.

    It answers to a step alike for both videos, where the law is exact.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 2, 3, 2, 2)
    weights = torch.zeros(shape).requires_grad_()
    # Signed errors that point more or less the same way, the loser's the larger ones.
    common, one, other = (torch.randn(shape, generator=generator) for _ in range(3))
    first, second = common + 0.5 * one + weights, 1.5 * common + 0.5 * other + weights
    return weights, replace(
        random_errors(pairs=1),
        policy_first=first.square(),
        policy_second=second.square(),
        reference_first=first.detach().square(),
        reference_second=second.detach().square(),
        policy_product=(first * second).detach(),
        preference=torch.ones(1, 3),
        region=torch.ones(1, 1, 3, 2, 2),
        strength=torch.zeros(1),
    )


def test_a_step_leaves_the_chosen_video_its_share_of_the_descent() -> None:
    limited = 0
    for seed in range(20):
        weights, errors = shared_weights(seed)
        winner = torch.autograd.grad(errors.policy_first.mean(), weights, retain_graph=True)
        push = 2500 / 2  # beta * sigmoid(0), on |grad L_w|^2
        for mu in (0.0, 0.5, 0.9, 1.0):
            loss = SDPO(mu=mu)
            step = torch.autograd.grad(loss(errors).loss.sum(), weights, retain_graph=True)
            kept = dot(step, winner) / (push * dot(winner, winner))
            assert kept > mu - 1e-4
            if 0 < loss.rejected_scale(errors).item() < 1:
                limited += 1
                assert abs(kept - mu) < 1e-4  # no more of the loser is given up than needed
    assert limited > 20


def test_a_small_step_lowers_the_chosen_error_where_global_raises_it() -> None:
    raised = {"global": 0, "sdpo": 0}
    for seed in range(20):
        weights, errors = shared_weights(seed)
        before = errors.policy_first.mean().item()
        losses: dict[str, Loss] = {"global": Global(), "sdpo": SDPO()}
        for name, loss in losses.items():
            (step,) = torch.autograd.grad(loss(errors).loss.sum(), weights, retain_graph=True)
            signed = errors.policy_first.detach().sqrt()
            # The sign of the error is that of half its square's gradient.
            (slope,) = torch.autograd.grad(errors.policy_first.sum(), weights, retain_graph=True)
            after = (signed * slope.sign() - 1e-5 * step).square().mean().item()
            raised[name] += after > before
    assert raised["sdpo"] == 0
    assert raised["global"] > 3


def test_the_chosen_error_falls_on_a_real_network_too(small_model: AnimateDiffModel) -> None:
    # The gradients on the outputs stand for those on the weights, so the law is no longer exact:
    # mu is what absorbs the difference.
    policy = adapt(small_model, TrainSettings(rank=2, alpha=4), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if ".lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    reference_model = Toggle().attach(policy)
    weights = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    shape = (1, *small_model.latent_shape)
    raised = {"global": 0, "sdpo": 0}
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        first, change, noise = (torch.randn(shape, generator=generator) for _ in range(3))
        batch = PairBatch(
            first=first,
            second=first + 0.3 * change,
            preference=torch.ones(1, shape[2]),
            region=torch.ones(1, 1, *shape[2:]),
            strength=torch.zeros(1),
            context=small_model.encode_prompts(["a red square moving left slowly"]),
            keys=["0"],
        )
        timestep = small_model.sample_timesteps(1, generator)
        errors = pair_errors(small_model, policy, reference_model, batch, noise, timestep)
        winner = torch.autograd.grad(errors.policy_first.mean(), weights, retain_graph=True)
        losses: dict[str, Loss] = {"global": Global(), "sdpo": SDPO()}
        for name, loss in losses.items():
            step = torch.autograd.grad(loss(errors).loss.sum(), weights, retain_graph=True)
            raised[name] += dot(step, winner) < 0
        torch.testing.assert_close(
            errors.policy_product.abs(), (errors.policy_first * errors.policy_second).sqrt()
        )
        assert not errors.policy_product.requires_grad
    assert raised["sdpo"] == 0
    assert raised["global"] > 0


def test_the_value_is_that_of_global() -> None:
    errors = replace(random_errors(change=1e-3), policy_product=torch.full((3, 2, 4, 3, 3), 0.9))
    torch.testing.assert_close(SDPO()(errors).loss, Global()(errors).loss, rtol=0, atol=0)
    plain, safe = gradients(Global(), errors), gradients(SDPO(), errors)
    torch.testing.assert_close(safe[0], plain[0])  # the winner's, untouched
    assert (safe[1].abs() < plain[1].abs()).all()


def test_at_mu_1_an_aligned_rejected_gradient_is_zero() -> None:
    errors = replace(random_errors(change=1e-3), policy_product=torch.full((3, 2, 4, 3, 3), 0.1))
    first, second = gradients(SDPO(mu=1), errors)
    assert first.all() and not second.any()
