"""Forward and backward passes of a batch: joint, split or linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from dpo_video.errors import TrainingError
from dpo_video.memory.compile import without_graph
from dpo_video.settings import MemorySettings
from dpo_video.strategies import Loss, ReferenceModel, VideoModel
from dpo_video.training.objective import (
    Inputs,
    PairFigures,
    chosen_errors,
    figures,
    group_errors,
    loss_of,
    no_errors,
    noised,
    pair_errors,
    predicted,
    reference_predictions,
    seen_by_losses,
    signed_errors,
)
from dpo_video.types import Latents, PairBatch, PairErrors, PerPair


def check_backward(loss: Loss, memory: MemorySettings) -> None:
    """Raise a TrainingError if the loss cannot be trained in this mode."""
    if memory.backward == "linear" and not loss.linear_in_mean_error:
        raise TrainingError(
            "memory.backward=linear needs a loss of the mean errors of whole videos, and "
            f"{type(loss).__name__} is none. Set memory.backward=split, which supports every loss."
        )


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """The forward and backward passes of a batch.

    joint: one forward pass for both videos of all pairs, and one backward pass. split: the graph of
    one video at a time, for one more forward pass per pair. linear: the graph of one video at a
    time without that pass, for losses that are functions of mean errors. For a loss that sees the
    chosen video only, joint has one graph for the chosen videos of all pairs, and both others one
    per pair.
    """

    model: VideoModel
    policy: nn.Module
    reference_model: ReferenceModel | None
    """None if the loss needs none, or compares with none."""
    loss: Loss
    mode: Literal["joint", "split", "linear"] = "joint"
    backward: Callable[[Tensor], None] = Tensor.backward
    """Backward pass of a scalar, which a loss scaler may scale."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context of the forward passes."""

    @property
    def videos_at_once(self) -> Literal[1, 2]:
        """Videos of a pair in one forward pass."""
        return 2 if self.mode == "joint" else 1

    def __call__(
        self,
        batch: PairBatch,
        noise: Latents,
        timestep: PerPair,
        *,
        reference_prediction: Float[Tensor, "2*b c f h w"] | None = None,
        weight: PerPair | None = None,
        loss_scale: float = 1.0,
        progress: float = 0.0,
    ) -> PairFigures:
        """Add the gradient of `loss_scale` times the mean loss to the policy's gradients.

        The `loss` of the figures is multiplied by the weights.

        Args:
            batch: The pairs.
            noise: One draw per pair, for both videos.
            timestep: One draw per pair, for both videos.
            reference_prediction: Cached predictions of the reference, made by `reference`.
            weight: Weights of the pairs in the mean; None for equal ones.
            loss_scale: Weight of this batch in its optimizer step.
            progress: Share of the run's optimizer steps that are done.
        """
        count = len(batch.first)
        if weight is None:
            weight = torch.ones(count, device=noise.device)
        if self.mode == "joint":
            errors = self._joint(
                batch, noise, timestep, reference_prediction, weight * loss_scale, progress
            )
            return figures(self.loss, errors).weighted(weight)
        one_pair = self._split if self.mode == "split" else self._linear
        parts = []
        for pair in range(count):
            rows = slice(pair, pair + 1)
            mine = _only(batch, rows)
            scale = weight[rows] * loss_scale / count
            if not self.loss.compares:
                errors = self._joint(mine, noise[rows], timestep[rows], None, scale, progress)
                parts.append(figures(self.loss, errors))
                continue
            all_videos = noised(self.model, mine, noise[rows], timestep[rows])
            inputs = [all_videos.only([video]) for video in range(len(all_videos.timestep))]
            if self.reference_model is None:
                reference = [no_errors(each.target) for each in inputs]
            else:
                if reference_prediction is None:
                    predicted = [self._reference(each) for each in inputs]
                else:
                    predicted = [
                        reference_prediction[rows],
                        reference_prediction[count + pair : count + pair + 1],
                    ]
                reference = [
                    signed_errors(prediction, each)
                    for prediction, each in zip(predicted, inputs, strict=True)
                ]
            seen = seen_by_losses(self.model, timestep[rows], progress)
            parts.append(one_pair(_Pair(mine, inputs, reference, seen, scale)))
        return PairFigures.cat(parts).weighted(weight)

    def reference(
        self, batch: PairBatch, noise: Latents, timestep: PerPair
    ) -> Float[Tensor, "2*b c f h w"]:
        """Predictions of the reference for one pair, first and second, as the step makes them.

        The last bits depend on the number of videos in a forward pass, which must be the same for
        policy and reference.
        """
        inputs = noised(self.model, batch, noise, timestep)
        if self.mode == "joint":
            return self._reference(inputs)
        return torch.cat([self._reference(inputs.only([video])) for video in range(2)])

    def average(self, accelerator: Accelerator) -> None:
        """Average the policy's gradients over all processes, if the passes did not."""
        if accelerator.num_processes == 1:
            return
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        # Another process may have used a part of the network that this one has not.
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([gradient.flatten() for gradient in own])  # one collective for all
        mean = accelerator.reduce(flat, reduction="mean").split([p.numel() for p in trained])
        for parameter, gradient, part in zip(trained, own, mean, strict=True):
            # Into memory of its own: kernels round differently by a tensor's alignment.
            parameter.grad = gradient.copy_(part.view_as(gradient))

    def _reference(self, inputs: Inputs) -> Latents:
        assert self.reference_model is not None
        with self.autocast():
            return reference_predictions(self.model, self.reference_model, inputs)

    def _signed(self, inputs: Inputs) -> Latents:
        # A separate autocast: one that has run without a graph caches casts without a graph.
        with self.autocast():
            prediction = predicted(self.model, self.policy, inputs)
        return signed_errors(prediction, inputs)

    def _joint(
        self,
        batch: PairBatch,
        noise: Latents,
        timestep: PerPair,
        reference_prediction: Float[Tensor, "2*b c f h w"] | None,
        scale: PerPair,
        progress: float,
    ) -> PairErrors:
        with self.autocast():
            if self.loss.compares:
                errors = pair_errors(
                    self.model,
                    self.policy,
                    self.reference_model,
                    batch,
                    noise,
                    timestep,
                    reference_prediction=reference_prediction,
                    progress=progress,
                )
            else:
                errors = chosen_errors(
                    self.model, self.policy, batch, noise, timestep, progress=progress
                )
        self.backward((loss_of(self.loss, errors).loss * scale).mean())
        return errors

    def _split(self, pair: _Pair) -> PairFigures:
        """The errors without a graph, then each video's with one, in turn.

        `d loss / d errors` needs the errors of all videos, but not their graphs. The second
        video's are computed once, with its graph.
        """
        first, _, *between = pair.inputs
        with without_graph(self.policy):
            others = [self._signed(inputs).detach() for inputs in (first, *between)]
        second = self._signed(pair.inputs[1])
        errors, slopes = pair.slopes(self.loss, [others[0], second.detach(), *others[1:]])
        self.backward((second.square() * slopes[1]).sum())
        del second
        for video in (0, *range(2, len(pair.inputs))):
            signed = self._signed(pair.inputs[video])
            self.backward((signed.square() * slopes[video]).sum())
            del signed
        return figures(self.loss, errors)

    def _linear(self, pair: _Pair) -> PairFigures:
        """Each video's gradient times an estimate of the loss's slope, corrected at the end.

        For a loss whose slope is one number per video, `grad loss` is the sum over the videos of
        `slope grad mean(errors)`. The estimate is the slope of a policy that equals its
        reference: it keeps half-precision gradients as large as they are in the other modes.
        """
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        before = _take_gradients(parameters)
        _, untrained = pair.slopes(self.loss, pair.reference)
        signed, gradients, estimates = [], [], []
        for inputs, slope in zip(pair.inputs, untrained, strict=True):
            estimate = slope.sum()
            estimate = torch.where(estimate == 0, 1.0, estimate)
            error = self._signed(inputs)
            self.backward(error.square().mean() * estimate)
            signed.append(error.detach())
            del error
            estimates.append(estimate)
            gradients.append(_take_gradients(parameters))
        errors, slopes = pair.slopes(self.loss, signed)
        if any(not _constant(slope) for slope in slopes if slope.isfinite().all()):
            raise TrainingError(
                f"{type(self.loss).__name__} declares linear_in_mean_error, but its gradient "
                "differs between the errors of a video. Set memory.backward=split."
            )
        factors = [
            slope.sum() / estimate for slope, estimate in zip(slopes, estimates, strict=True)
        ]
        for parameter, kept, *found in zip(parameters, before, *gradients, strict=True):
            parts = [
                gradient * factor
                for gradient, factor in zip(found, factors, strict=True)
                if gradient is not None
            ]
            total = sum(parts[1:], start=parts[0]) if parts else None
            parameter.grad = kept if total is None else total if kept is None else kept + total
        return figures(self.loss, errors)


@dataclass(frozen=True)
class _Pair:
    """One pair or group, its videos separately: first, second, and those between."""

    batch: PairBatch
    inputs: Sequence[Inputs]
    reference: Sequence[Latents]
    """The signed errors of the reference."""
    seen: dict[str, PerPair]
    """At which timestep, and when in the run, the errors are made."""
    loss_scale: PerPair
    """Weight of the pair in its optimizer step."""

    def slopes(
        self, loss: Loss, signed: Sequence[Latents]
    ) -> tuple[PairErrors, tuple[Tensor, ...]]:
        """The policy's squared errors from its signed ones, and the loss's gradient on them."""
        policy = [each.square().requires_grad_() for each in signed]
        reference = [each.square() for each in self.reference]
        errors = PairErrors(
            policy_first=policy[0],
            policy_second=policy[1],
            reference_first=reference[0],
            reference_second=reference[1],
            policy_product=signed[0] * signed[1],
            between=group_errors(self.batch, policy[2:], reference[2:]),
            preference=self.batch.preference,
            region=self.batch.region,
            strength=self.batch.strength,
            **self.seen,
        )
        slopes = torch.autograd.grad(
            (loss_of(loss, errors).loss * self.loss_scale).mean(), policy, materialize_grads=True
        )
        return errors, slopes


def _constant(values: Tensor) -> bool:
    return torch.equal(values, values.flatten()[0].expand_as(values))


def _take_gradients(parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """Remove and return the gradients of the parameters."""
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
        between=None if batch.between is None else batch.between[rows],
        ranks=None if batch.ranks is None else batch.ranks[rows],
    )
