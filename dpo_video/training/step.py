"""What a training step holds at once: checkpointed blocks, and one video's graph at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_video.errors import TrainingError
from dpo_video.memory.compile import without_graph
from dpo_video.settings import MemorySettings
from dpo_video.strategies import Loss, ReferenceModel, VideoModel
from dpo_video.training.objective import (
    Inputs,
    loss_of,
    noised,
    pair_errors,
    reference_predictions,
    signed_errors,
)
from dpo_video.types import Latents, LossOutput, PairBatch, PairErrors, PerPair

# --- backward passes ---------------------------------------------------------------------------


def check_backward(loss: Loss, memory: MemorySettings) -> None:
    """A TrainingError if the loss cannot be trained in this mode."""
    if memory.backward == "linear" and not loss.linear_in_mean_error:
        raise TrainingError(
            f"memory.backward=linear is for losses that look at means over whole videos, and "
            f"{type(loss).__name__} does not. Set memory.backward=split, which is for any loss."
        )


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """The forward and backward passes of a batch, in the order that the mode asks for."""

    model: VideoModel
    policy: nn.Module
    reference_model: ReferenceModel
    loss: Loss
    mode: Literal["joint", "split", "linear"] = "joint"
    backward: Callable[[Tensor], None] = Tensor.backward
    """Of a scalar; it may scale it for the length of the backward pass."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What forward passes run in."""

    @property
    def videos_at_once(self) -> Literal[1, 2]:
        """Of a pair, in a forward pass."""
        return 2 if self.mode == "joint" else 1

    def __call__(
        self,
        batch: PairBatch,
        noise: Latents,
        timestep: PerPair,
        *,
        reference_prediction: Float[Tensor, "2*b c f h w"] | None = None,
        loss_scale: float = 1.0,
    ) -> LossOutput:
        """Add the gradient of `share` times the mean loss to the policy's; the detached outputs.

        Args:
            batch: The pairs.
            noise: One draw a pair.
            timestep: One draw a pair.
            reference_prediction: The reference's predictions if they were made before, by
                `reference`.
            loss_scale: What this batch counts in its optimizer step.
        """
        count = len(batch.first)
        if self.mode == "joint":
            return self._joint(batch, noise, timestep, reference_prediction, loss_scale)
        one_pair = self._split if self.mode == "split" else self._linear
        outputs = []
        for pair in range(count):
            rows = slice(pair, pair + 1)
            mine = _only(batch, rows)
            both = noised(self.model, mine, noise[rows], timestep[rows])
            inputs = both.only([0]), both.only([1])
            if reference_prediction is None:
                predicted = self._reference(inputs[0]), self._reference(inputs[1])
            else:
                predicted = (
                    reference_prediction[rows],
                    reference_prediction[count + pair : count + pair + 1],
                )
            reference = (
                signed_errors(predicted[0], inputs[0]), signed_errors(predicted[1], inputs[1])
            )  # fmt: skip
            outputs.append(one_pair(_Pair(mine, inputs, reference, loss_scale / count)))
        return LossOutput(
            **{
                name: torch.cat([getattr(output, name) for output in outputs])
                for name in LossOutput.__dataclass_fields__
            }
        )

    def reference(
        self, batch: PairBatch, noise: Latents, timestep: PerPair
    ) -> Float[Tensor, "2*b c f h w"]:
        """The reference's predictions of one pair, first and second, as the step makes them.

        Last bits depend on how many videos are in a forward pass; policy and reference must have
        as many.
        """
        inputs = noised(self.model, batch, noise, timestep)
        if self.mode == "joint":
            return self._reference(inputs)
        return torch.cat([self._reference(inputs.only([video])) for video in range(2)])

    def _reference(self, inputs: Inputs) -> Latents:
        with self.autocast():
            return reference_predictions(self.model, self.reference_model, inputs)

    def _signed(self, inputs: Inputs) -> Latents:
        # In an autocast of its own: one that has run without a graph keeps casts without one.
        with self.autocast():
            prediction = self.model.predict(
                self.policy, inputs.noisy, inputs.timestep, inputs.context
            )
        return signed_errors(prediction, inputs)

    def _joint(
        self,
        batch: PairBatch,
        noise: Latents,
        timestep: PerPair,
        reference_prediction: Float[Tensor, "2*b c f h w"] | None,
        loss_scale: float,
    ) -> LossOutput:
        with self.autocast():
            errors = pair_errors(
                self.model,
                self.policy,
                self.reference_model,
                batch,
                noise,
                timestep,
                reference_prediction=reference_prediction,
            )
        output = loss_of(self.loss, errors)
        self.backward(output.loss.mean() * loss_scale)
        return _detached(output)

    def _split(self, pair: _Pair) -> LossOutput:
        """The first's errors without a graph; then each with one, one after the other.

        The loss lies between errors and gradients: `d loss / d errors` needs the errors of both
        videos, but no graph of theirs.
        """
        with without_graph(self.policy):
            first = self._signed(pair.inputs[0]).detach()
        second = self._signed(pair.inputs[1])
        output, slopes = pair.slopes(self.loss, first, second.detach())
        self.backward((second.square() * slopes[1]).sum())
        del second
        first = self._signed(pair.inputs[0])
        self.backward((first.square() * slopes[0]).sum())
        return output

    def _linear(self, pair: _Pair) -> LossOutput:
        """Each video's gradient by itself, times a guess of the loss's slope, then set right.

        For a loss whose slope is one number a video, `grad loss = slope_1 grad mean(errors_1) +
        slope_2 grad mean(errors_2)`. The guess, the slope of a policy that equals its reference,
        keeps half-precision gradients as large as they are in the other modes.
        """
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        before = _taken(parameters)
        _, untrained = pair.slopes(self.loss, *pair.reference)
        signed, gradients, guesses = [], [], []
        for inputs, slope in zip(pair.inputs, untrained, strict=True):
            guess = slope.sum()
            guess = torch.where(guess == 0, 1.0, guess)
            errors = self._signed(inputs)
            self.backward(errors.square().mean() * guess)
            signed.append(errors.detach())
            del errors
            guesses.append(guess)
            gradients.append(_taken(parameters))
        output, slopes = pair.slopes(self.loss, signed[0], signed[1])
        if any(not torch.equal(slope, slope.flatten()[0].expand_as(slope)) for slope in slopes):
            raise TrainingError(
                f"{type(self.loss).__name__} says that it is uniform, but its gradient differs "
                "from one error to the next. Set memory.backward=split."
            )
        factors = [slope.sum() / guess for slope, guess in zip(slopes, guesses, strict=True)]
        for parameter, kept, first, second in zip(parameters, before, *gradients, strict=True):
            parts = [
                gradient * factor
                for gradient, factor in zip((first, second), factors, strict=True)
                if gradient is not None
            ]
            total = sum(parts[1:], start=parts[0]) if parts else None
            parameter.grad = kept if total is None else total if kept is None else kept + total
        return output


@dataclass(frozen=True)
class _Pair:
    """One pair, its two videos apart."""

    batch: PairBatch
    inputs: tuple[Inputs, Inputs]
    reference: tuple[Latents, Latents]
    """The signed errors of the reference."""
    loss_scale: float
    """What it counts in its optimizer step."""

    def slopes(
        self, loss: Loss, first: Latents, second: Latents
    ) -> tuple[LossOutput, tuple[Tensor, Tensor]]:
        """The loss of the policy's signed errors, and its gradient on their squares."""
        errors = PairErrors(
            policy_first=first.square().requires_grad_(),
            policy_second=second.square().requires_grad_(),
            reference_first=self.reference[0].square(),
            reference_second=self.reference[1].square(),
            policy_product=first * second,
            preference=self.batch.preference,
            region=self.batch.region,
            strength=self.batch.strength,
        )
        output = loss_of(loss, errors)
        of_first, of_second = torch.autograd.grad(
            output.loss.mean() * self.loss_scale,
            (errors.policy_first, errors.policy_second),
            materialize_grads=True,
        )
        return _detached(output), (of_first, of_second)


def _taken(parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """Their gradients, which they have no more."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def _only(batch: PairBatch, rows: slice) -> PairBatch:
    return replace(
        batch,
        first=batch.first[rows],
        second=batch.second[rows],
        preference=batch.preference[rows],
        region=batch.region[rows],
        strength=batch.strength[rows],
        context={name: value[rows] for name, value in batch.context.items()},
        keys=batch.keys[rows],
    )


def _detached(output: LossOutput) -> LossOutput:
    values = {name: getattr(output, name).detach() for name in LossOutput.__dataclass_fields__}
    return LossOutput(**values)
