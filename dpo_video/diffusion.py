"""The DPO step's mathematics: errors of two networks on two videos, and the sigmoid loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_video.seeds import generator
from dpo_video.strategies import Anchor, VideoModel
from dpo_video.types import Context, Latents, LossOutput, PairBatch, PairErrors, PerPair


def initial_noise(model: VideoModel, seeds: Sequence[int]) -> Latents:
    """What sampling starts from, one video a seed: the same seed always means the same noise."""
    drawn = [torch.randn(model.latent_shape, generator=generator(seed, "video")) for seed in seeds]
    return torch.stack(drawn).to(model.device)


def pair_errors(
    model: VideoModel,
    policy: nn.Module,
    anchor: Anchor,
    batch: PairBatch,
    noise: Latents,
    level: PerPair,
) -> PairErrors:
    """Squared errors of policy and reference on both videos, in fp32.

    Both videos of a pair get the same noise and the same level (Diffusion-DPO, Sec. 4), and both
    networks the same inputs in the same batch, so that equal networks give equal errors to the bit.
    The reference runs first: with a toggled adapter, nothing may stand between the policy's forward
    and its backward.
    """
    clean = torch.cat([batch.first, batch.second])
    noise, level = noise.repeat(2, 1, 1, 1, 1), level.repeat(2)
    context: Context = {name: torch.cat([value, value]) for name, value in batch.context.items()}
    noisy = model.add_noise(clean, noise, level)
    target = model.target(clean, noise, level).float()

    def errors(network: nn.Module) -> Latents:
        prediction = model.predict(network, noisy, level, context)
        # An fp16 error near 0.5 is 4.9e-4 from its neighbour: 1.2 logits at a slope of 2500.
        return (prediction.float() - target).square()

    with torch.no_grad(), anchor.network() as reference:
        reference_first, reference_second = errors(reference).chunk(2)
    policy_first, policy_second = errors(policy).chunk(2)
    return PairErrors(
        policy_first=policy_first,
        policy_second=policy_second,
        reference_first=reference_first,
        reference_second=reference_second,
        preference=batch.preference,
        region=batch.region,
        strength=batch.strength,
    )


def chosen_of(errors: PairErrors, first: Tensor, second: Tensor) -> Tensor:
    """For each pair, the tensor that belongs to the chosen video (the first of an even pair)."""
    wins = (errors.winner >= 0).view(-1, *(1,) * (first.ndim - 1))
    return torch.where(wins, first, second)


def sigmoid_loss(
    first: PerPair, second: PerPair, winner: PerPair, beta: float | PerPair
) -> LossOutput:
    """`-logsigmoid(beta * m)` of the changes of error `d(first)`, `d(second)`, one per pair.

    `m = d(rejected) - d(chosen)`. An even pair (`winner` 0) has margin 0 and no gradient.
    """
    margin = winner * (second - first)
    logits = beta * margin
    return LossOutput(
        loss=-F.logsigmoid(logits),
        margin=margin,
        logits=logits,
        chosen_change=torch.where(winner >= 0, first, second),
        rejected_change=torch.where(winner >= 0, second, first),
    )
