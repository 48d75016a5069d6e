"""The DPO step's mathematics: errors of two networks on two videos, and what losses share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """What both networks are shown: all pairs' first videos, then all their second ones."""

    noisy: Latents
    timestep: PerPair
    context: Context
    target: Latents
    """What a perfect prediction would be."""

    def only(self, rows: Sequence[int]) -> Inputs:
        """Some of the videos."""
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
    """What the reference predicts, without a graph."""
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
    the bit. The reference runs first: with a toggled adapter, nothing may stand between the
    policy's forward and its backward.

    Args:
        model: The family.
        policy: What trains.
        reference_model: What it is compared with.
        batch: The pairs.
        noise: One draw a pair.
        timestep: One draw a pair.
        reference_prediction: The reference's predictions if they were made before, pair by pair.
            The reference does not run then, and the policy runs pair by pair too, because the
            last bits of a prediction depend on the size of its batch.
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
    """Prediction less target, in fp32.

    An fp16 error near 0.5 is 4.9e-4 from its neighbour: 1.2 logits at a slope of 2500. All lie in
    memory alike, since the last bits of a sum depend on its order.
    """
    return prediction.float().contiguous() - inputs.target.float().contiguous()


def _pair_by_pair(model: VideoModel, network: nn.Module, inputs: Inputs) -> Latents:
    """Predictions of one forward pass a pair."""
    count = len(inputs.timestep) // 2
    parts = []
    for pair in range(count):
        both = inputs.only([pair, count + pair])
        parts.append(model.predict(network, both.noisy, both.timestep, both.context))
    return torch.cat([*(part[:1] for part in parts), *(part[1:] for part in parts)])


def loss_of(loss: Loss, errors: PairErrors) -> LossOutput:
    """The loss of every pair.

    Raises:
        TrainingError: if it gives anything else, as a stranger's may.
    """
    output = loss(errors)
    count = len(errors.preference)
    given = vars(output) if isinstance(output, LossOutput) else {type(output).__name__: None}
    for name, value in given.items():
        if not (isinstance(value, Tensor) and value.shape == (count,)):
            raise TrainingError(
                f"The loss {type(loss).__name__} of {type(loss).__module__} does not give one "
                f"'{name}' a pair. It is to return a LossOutput without a mean over the pairs; "
                "dpo_video.testing.check_loss says more."
            )
    return output
