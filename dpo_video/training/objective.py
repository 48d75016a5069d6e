"""Errors of policy and reference on both videos of a pair, and what a loss makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_video.memory.compile import without_graph
from dpo_video.registry.returned import checked, wrong
from dpo_video.strategies import Loss, ReferenceModel, VideoModel
from dpo_video.types import (
    Context,
    GroupErrors,
    Latents,
    LossOutput,
    PairBatch,
    PairErrors,
    PerPair,
)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs of both networks: the first videos of all pairs, then their second ones.

    Then, for groups, the best of the samples between of all of them, then the next ones, and so on.
    """

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
    """All videos of a pair at the same noise and the same timestep (Diffusion-DPO, Sec. 4)."""
    between = () if batch.between is None else batch.between.unbind(dim=1)
    clean, videos = torch.cat([batch.first, batch.second, *between]), 2 + len(between)
    noise, timestep = noise.repeat(videos, 1, 1, 1, 1), timestep.repeat(videos)
    return Inputs(
        noisy=model.add_noise(clean, noise, timestep),
        timestep=timestep,
        context={name: torch.cat([value] * videos) for name, value in batch.context.items()},
        target=model.target(clean, noise, timestep),
    )


def seen_by_losses(
    model: VideoModel, timestep: PerPair, progress: float = 0.0
) -> dict[str, PerPair]:
    """The fields of `PairErrors` that say at which timesteps and when in the run errors were made.

    `add_noise` is linear, so its factors are those of ones and zeros.
    """
    one = torch.ones(len(timestep), 1, 1, 1, 1, device=timestep.device)
    return {
        "timestep": timestep,
        "signal": model.add_noise(one, 0 * one, timestep).flatten(),
        "noise": model.add_noise(0 * one, one, timestep).flatten(),
        "progress": torch.full_like(timestep, progress),
    }


def no_errors(like: Latents) -> Latents:
    """Errors of 0 in fp32, which take no memory."""
    return torch.zeros((), device=like.device).expand_as(like)


def predicted(model: VideoModel, network: nn.Module, inputs: Inputs) -> Latents:
    """The prediction of a network.

    Raises:
        PluginError: if it does not have the target's shape.
    """
    found = model.predict(network, inputs.noisy, inputs.timestep, inputs.context)
    return checked(model, "predictions", found, inputs.target.shape, finite=False)


def reference_predictions(
    model: VideoModel, reference_model: ReferenceModel, inputs: Inputs
) -> Latents:
    """Predictions of the reference, without a graph."""
    with reference_model.network() as reference:
        if not isinstance(reference, nn.Module):
            raise wrong(reference_model, f"yields a {type(reference).__name__}, not a network")
        with without_graph(reference):
            return predicted(model, reference, inputs).detach()


def pair_errors(
    model: VideoModel,
    policy: nn.Module,
    reference_model: ReferenceModel | None,
    batch: PairBatch,
    noise: Latents,
    timestep: PerPair,
    *,
    reference_prediction: Float[Tensor, "2*b c f h w"] | None = None,
    progress: float = 0.0,
) -> PairErrors:
    """Squared errors of policy and reference on both videos, in fp32.

    Both networks get the same inputs in the same batch, so that equal networks give equal errors to
    the bit. The reference runs first: with a toggled adapter, nothing may run between the policy's
    forward pass and its backward pass.

    Args:
        model: The model family.
        policy: The network being trained.
        reference_model: The frozen network it is compared with; None for errors of 0.
        batch: The pairs.
        noise: One draw per pair.
        timestep: One draw per pair.
        reference_prediction: Cached predictions of the reference, made pair by pair. The reference
            then does not run, and the policy runs pair by pair too, because the last bits of a
            prediction depend on the batch size.
        progress: Share of the run's optimizer steps that are done.
    """
    inputs = noised(model, batch, noise, timestep)
    cached = reference_prediction is not None
    if reference_model is not None and not cached:
        reference_prediction = reference_predictions(model, reference_model, inputs)
    if cached:
        prediction = _pair_by_pair(model, policy, inputs)
    else:
        prediction = predicted(model, policy, inputs)
    videos = len(inputs.timestep) // len(timestep)
    signed = signed_errors(prediction, inputs).chunk(videos)
    if reference_prediction is None:
        of_reference = (no_errors(signed[0]),) * videos
    else:
        of_reference = signed_errors(reference_prediction, inputs).chunk(videos)
    squared, reference = ([each.square() for each in part] for part in (signed, of_reference))
    return PairErrors(
        policy_first=squared[0],
        policy_second=squared[1],
        reference_first=reference[0],
        reference_second=reference[1],
        policy_product=(signed[0] * signed[1]).detach(),
        between=group_errors(batch, squared[2:], reference[2:]),
        preference=batch.preference,
        region=batch.region,
        strength=batch.strength,
        **seen_by_losses(model, timestep, progress),
    )


def group_errors(
    batch: PairBatch, policy: Sequence[Latents], reference: Sequence[Latents]
) -> GroupErrors | None:
    """The errors on the samples between of groups, one tensor for each; None for pairs."""
    if batch.ranks is None:
        return None
    return GroupErrors(
        policy=torch.stack([*policy], dim=1),
        reference=torch.stack([*reference], dim=1),
        ranks=batch.ranks,
    )


def chosen_errors(
    model: VideoModel,
    policy: nn.Module,
    batch: PairBatch,
    noise: Latents,
    timestep: PerPair,
    *,
    progress: float = 0.0,
) -> PairErrors:
    """Squared errors of the policy on the chosen videos, for a loss that sees nothing else.

    The arguments are those of `pair_errors`.
    """
    first_is_chosen = (batch.preference.sum(dim=1) >= 0).view(-1, 1, 1, 1, 1)
    clean = torch.where(first_is_chosen, batch.first, batch.second)
    inputs = Inputs(
        noisy=model.add_noise(clean, noise, timestep),
        timestep=timestep,
        context=batch.context,
        target=model.target(clean, noise, timestep),
    )
    errors = signed_errors(predicted(model, policy, inputs), inputs).square()
    none = no_errors(errors)
    return PairErrors(
        policy_first=torch.where(first_is_chosen, errors, none),
        policy_second=torch.where(first_is_chosen, none, errors),
        reference_first=none,
        reference_second=none,
        policy_product=none,
        between=None,
        preference=batch.preference,
        region=batch.region,
        strength=batch.strength,
        **seen_by_losses(model, timestep, progress),
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
        parts.append(predicted(model, network, inputs.only([pair, count + pair])))
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
        PluginError: if the output is not a LossOutput of one value per pair, or its loss or margin
            has no gradient.
    """
    output = loss(errors)
    if not isinstance(output, LossOutput):
        raise wrong(loss, f"returns a {type(output).__name__}, not a LossOutput")
    device = errors.preference.device.type
    for figure, value in vars(output).items():  # values that are not finite skip the step
        checked(loss, f"a {figure}", value, (len(errors.preference),), finite=False, device=device)
        if value.dtype != errors.policy_first.dtype:
            raise wrong(loss, f"returns a {figure} in {str(value.dtype).removeprefix('torch.')}")
    if errors.policy_first.requires_grad:
        for figure in ("loss", "margin"):
            if not vars(output)[figure].requires_grad:
                raise wrong(loss, f"returns a {figure} without a gradient")
    return output


def figures(loss: Loss, errors: PairErrors) -> PairFigures:
    """What the loss does at these errors, and at those of a policy that equals its reference.

    Both slopes are `d loss / d margin` by autograd on the errors: no network runs. A loss that does
    not compare the videos has no margin: all figures but its value and the chosen video's error
    are those of margin 0.
    """
    if not loss.compares:
        output = loss_of(loss, errors)
        none = torch.zeros_like(output.loss.detach())
        return PairFigures(
            loss=output.loss.detach(),
            margin=none,
            logits=none,
            gradient_factor=none + 0.5,
            chosen_change=output.chosen_change.detach(),
            rejected_change=none,
        )
    between = errors.between
    if between is not None:
        errors = replace(errors, between=replace(between, policy=between.policy.detach()))
        between = replace(between, policy=between.reference)
    output, slope = _slope(loss, errors)
    equal = replace(
        errors,
        policy_first=errors.reference_first,
        policy_second=errors.reference_second,
        between=between,
    )
    _, initial = _slope(loss, equal)
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
