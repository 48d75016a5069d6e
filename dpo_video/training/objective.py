"""Errors of policy and reference on both videos of a pair, and what a loss makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_video.errors import TrainingError
from dpo_video.memory.compile import without_graph
from dpo_video.strategies import Loss, ReferenceModel, VideoModel
from dpo_video.types import (
    Context,
    Latents,
    LossOutput,
    PairBatch,
    PairErrors,
    PerPair,
)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs of both networks: the first videos of all pairs, then their second ones."""

    noisy: Latents
    timestep: PerPair
    context: Context
    target: Latents
    """The prediction with error 0: epsilon, v or flow velocity."""

    def only(self, rows: Sequence[int]) -> Inputs:
        """A subset of the videos."""
        return Inputs(
            noisy=self.noisy[rows],
            timestep=self.timestep[rows],
            context={name: value[rows] for name, value in self.context.items()},
            target=self.target[rows],
        )


def noised(model: VideoModel, batch: PairBatch, noise: Latents, timestep: PerPair) -> Inputs:
    """Both videos of a pair at the same noise and the same timestep (Diffusion-DPO, Sec. 4)."""
    clean = torch.cat([batch.first, batch.second])
    noise, timestep = noise.repeat(2, 1, 1, 1, 1), timestep.repeat(2)
    return Inputs(
        noisy=model.add_noise(clean, noise, timestep),
        timestep=timestep,
        context={name: torch.cat([value, value]) for name, value in batch.context.items()},
        target=model.target(clean, noise, timestep),
    )


def reference_predictions(
    model: VideoModel, reference_model: ReferenceModel, inputs: Inputs
) -> Latents:
    """Predictions of the reference, without a graph."""
    with reference_model.network() as reference, without_graph(reference):
        return model.predict(reference, inputs.noisy, inputs.timestep, inputs.context).detach()


def pair_errors(
    model: VideoModel,
    policy: nn.Module,
    reference_model: ReferenceModel,
    batch: PairBatch,
    noise: Latents,
    timestep: PerPair,
    *,
    reference_prediction: Float[Tensor, "2*b c f h w"] | None = None,
) -> PairErrors:
    """Squared errors of policy and reference on both videos, in fp32.

    Both networks get the same inputs in the same batch, so that equal networks give equal errors to
    the bit. The reference runs first: with a toggled adapter, nothing may run between the policy's
    forward pass and its backward pass.

    Args:
        model: The model family.
        policy: The network being trained.
        reference_model: The frozen network it is compared with.
        batch: The pairs.
        noise: One draw per pair.
        timestep: One draw per pair.
        reference_prediction: Cached predictions of the reference, made pair by pair. The reference
            then does not run, and the policy runs pair by pair too, because the last bits of a
            prediction depend on the batch size.
    """
    inputs = noised(model, batch, noise, timestep)
    if reference_prediction is None:
        reference_prediction = reference_predictions(model, reference_model, inputs)
        prediction = model.predict(policy, inputs.noisy, inputs.timestep, inputs.context)
    else:
        prediction = _pair_by_pair(model, policy, inputs)
    first, second = signed_errors(prediction, inputs).chunk(2)
    reference_first, reference_second = signed_errors(reference_prediction, inputs).chunk(2)
    return PairErrors(
        policy_first=first.square(),
        policy_second=second.square(),
        reference_first=reference_first.square(),
        reference_second=reference_second.square(),
        policy_product=(first * second).detach(),
        preference=batch.preference,
        region=batch.region,
        strength=batch.strength,
    )


def signed_errors(prediction: Latents, inputs: Inputs) -> Latents:
    """Prediction minus target, in fp32.

    Neighbouring fp16 numbers near 0.5 are 4.9e-4 apart: 1.2 logits at a slope of 2500. All tensors
    are contiguous, since the last bits of a sum depend on its order.
    """
    return prediction.float().contiguous() - inputs.target.float().contiguous()


def _pair_by_pair(model: VideoModel, network: nn.Module, inputs: Inputs) -> Latents:
    """Predictions of one forward pass per pair."""
    count = len(inputs.timestep) // 2
    parts = []
    for pair in range(count):
        both = inputs.only([pair, count + pair])
        parts.append(model.predict(network, both.noisy, both.timestep, both.context))
    return torch.cat([*(part[:1] for part in parts), *(part[1:] for part in parts)])


@dataclass(frozen=True, kw_only=True)
class PairFigures:
    """Figures of every pair of a batch, detached."""

    loss: PerPair
    margin: PerPair
    logits: PerPair
    """The margin times twice the loss's slope at margin 0, which is `beta` for a sigmoid loss."""
    gradient_factor: PerPair
    """Half of the loss's slope on the margin relative to the slope at margin 0: 0.5 at the start, 0
    once the loss is satisfied. For a sigmoid loss it is sigmoid(-logits)."""
    chosen_change: PerPair
    rejected_change: PerPair

    def weighted(self, weight: PerPair) -> PairFigures:
        """The same figures with every loss times its pair's weight."""
        return replace(self, loss=self.loss * weight)

    @staticmethod
    def cat(parts: Sequence[PairFigures]) -> PairFigures:
        """The figures of several batches in one."""
        names = PairFigures.__dataclass_fields__
        return PairFigures(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        )


def loss_of(loss: Loss, errors: PairErrors) -> LossOutput:
    """The loss of every pair.

    Raises:
        TrainingError: if the output is not a LossOutput of one value per pair, or its margin has no
            gradient.
    """
    output = loss(errors)
    name, count = f"{type(loss).__name__} of {type(loss).__module__}", len(errors.preference)
    given = vars(output) if isinstance(output, LossOutput) else {type(output).__name__: None}
    for figure, value in given.items():
        if not (isinstance(value, Tensor) and value.shape == (count,)):
            raise TrainingError(
                f"The loss {name} does not return one '{figure}' per pair. Return a LossOutput "
                "without a mean over the pairs; dpo_video.testing.check_loss checks it."
            )
    if errors.policy_first.requires_grad and not output.margin.requires_grad:
        raise TrainingError(
            f"The margin of the loss {name} has no gradient. Compute it from the policy's errors "
            "without detach; dpo_video.testing.check_loss checks it."
        )
    return output


def figures(loss: Loss, errors: PairErrors) -> PairFigures:
    """What the loss does at these errors, and at those of a policy that equals its reference.

    Both slopes are `d loss / d margin` by autograd on the errors: no network runs.
    """
    output, slope = _slope(loss, errors)
    _, initial = _slope(
        loss,
        replace(errors, policy_first=errors.reference_first, policy_second=errors.reference_second),
    )
    pushes = initial != 0  # an even pair has no slope: it stays at its initial factor
    return PairFigures(
        loss=output.loss.detach(),
        margin=output.margin.detach(),
        logits=-2 * initial * output.margin.detach(),
        gradient_factor=0.5 * torch.where(pushes, slope / torch.where(pushes, initial, 1), 1),
        chosen_change=output.chosen_change.detach(),
        rejected_change=output.rejected_change.detach(),
    )


def _slope(loss: Loss, errors: PairErrors) -> tuple[LossOutput, PerPair]:
    """`d loss / d margin` of every pair; 0 where the margin has no gradient.

    The loss's gradient on the errors is projected on the margin's. Only the rejected video's errors
    count, those that raise the margin: an SFT term or a penalty pulls on the chosen video's errors
    whatever the margin is. Where a loss scales them to 0 (`sdpo`), the chosen video's count.
    """
    policy = [
        value.detach().requires_grad_() for value in (errors.policy_first, errors.policy_second)
    ]
    output = loss_of(loss, replace(errors, policy_first=policy[0], policy_second=policy[1]))
    of_margin = _gradient(output.margin, policy)
    of_loss = _gradient(output.loss, policy)
    rejected = of_margin.clamp(min=0)
    direction = torch.where(rejected.any(dim=1, keepdim=True), rejected, of_margin)
    norm = direction.square().sum(dim=1)
    return output, (of_loss * direction).sum(dim=1) / torch.where(norm > 0, norm, 1)


def _gradient(values: PerPair, errors: Sequence[Latents]) -> Float[Tensor, "b elements"]:
    """Gradient on the errors of both videos, flat."""
    parts = torch.autograd.grad(values.sum(), errors, retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten(1) for part in parts], dim=1)
