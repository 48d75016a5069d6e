"""The pairs of every forward pass, with their noise and timesteps, read ahead in a thread.

The draws are a function of the seed and of the position in an endless sequence of pairs, so neither
resuming nor the number of processes changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from dpo_video.data.segments import latent_parts, split
from dpo_video.data.store import PairStore
from dpo_video.errors import TrainingError
from dpo_video.extensions import TimestepSampler
from dpo_video.registry.returned import checked
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Loss, VideoModel
from dpo_video.support.rng import generator
from dpo_video.text import label_command
from dpo_video.training.checkpoint import TrainState
from dpo_video.training.reference_cache import PairDraw, ReferenceCache, ReferenceCacheReport
from dpo_video.types import Latents, PairBatch, PerPair


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Inputs of one forward pass: pairs, and one noise and one timestep per pair."""

    batch: PairBatch
    noise: Latents
    timestep: PerPair
    reference_prediction: Float[Tensor, "2*b c f h w"] | None = None
    """Cached predictions of the reference; None if the reference is to run."""
    weight: PerPair | None = None
    """Weights of the pairs in their optimizer step, 1 on average over all its pairs; None if all
    are 1."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> StepInputs:
        """The inputs with every tensor changed."""
        prediction, weight = self.reference_prediction, self.weight
        return StepInputs(
            batch=self.batch.mapped(change),
            noise=change(self.noise),
            timestep=change(self.timestep),
            reference_prediction=None if prediction is None else change(prediction),
            weight=None if weight is None else change(weight),
        )


def trainable_pairs(
    store: PairStore, loss: Loss, model: VideoModel, settings: TrainSettings
) -> list[int]:
    """Indices of the pairs to draw from: all but ties, and those that `min_decided` leaves out.

    Raises:
        TrainingError: if there are none, or they lack the regions that the loss needs.
    """
    if not len(store):
        raise TrainingError(f"'{store.where}' holds no pairs. Build some first.")
    if loss.needs_region and not store.has_regions:
        raise TrainingError(
            f"The pairs in '{store.where}' have no regions: their two videos may differ "
            "everywhere. Train them with --loss global, or build pairs that have regions "
            "(--pairs local)."
        )
    if loss.sees_groups and store.has_groups and store.labels_digest:
        raise TrainingError(
            "Labels judge two videos, and this loss compares whole groups by the ranking that they "
            "were built with. Leave --labels out, or train with --loss global."
        )
    decided = store.decided()
    segments = [part for part in latent_parts(model, split(model.shape)) if part.start < part.stop]
    pairs = [
        index for index in decided
        if not settings.min_decided
        or decided_share(store.preference(index), segments) > settings.min_decided
    ]  # fmt: skip
    if pairs:
        return pairs
    if decided:
        raise TrainingError(
            f"No pair in '{store.where}' prefers a video in more than {settings.min_decided:.0%} "
            "of its one-second segments. Lower train.min_decided, or label the pairs again."
        )
    if settings.labels:
        raise TrainingError(
            f"By the labels {', '.join(settings.labels)}, all {len(store)} pairs in "
            f"'{store.where}' are ties, from which there is nothing to learn. Label them "
            "otherwise (dpo-video list labeler), or build other pairs."
        )
    raise TrainingError(
        f"All {len(store)} pairs in '{store.where}' are ties, from which there is nothing to "
        "learn. Build them with a --labeler, or label them by metrics and train with --labels "
        f"metric: {label_command(store.where)}"
    )


def decided_share(preference: Float[Tensor, " f"], segments: Sequence[slice]) -> float:
    """Share of the segments, given as latent frames, that prefer one of the videos."""
    return sum(bool(preference[segment].any()) for segment in segments) / len(segments)


class PairSampler:
    """Draws the pairs of every step: each epoch is a permutation of all of them."""

    def __init__(
        self,
        model: VideoModel,
        store: PairStore,
        pairs: Sequence[int],
        loss: Loss,
        settings: TrainSettings,
        *,
        seed: int,
        accelerator: Accelerator,
        timesteps: TimestepSampler,
        noise_draws: int | None = None,
        cache: ReferenceCache | None = None,
        state: TrainState = TrainState(),  # noqa: B008 - it is frozen
    ) -> None:
        """Prepare to draw.

        Args:
            model: The model.
            store: The pairs.
            pairs: Indices of those to draw from.
            loss: Weighs the pairs of a step.
            settings: Batch size, accumulation and number of steps.
            seed: Seed of all draws.
            accelerator: Number of processes, and the device.
            timesteps: Draws the timesteps.
            noise_draws: Draws of noise and timestep per pair, used in turn; None for a new one at
                every visit.
            cache: Predictions of the reference for those draws.
            state: Where the run starts.
        """
        self._model, self._store, self._pairs, self._settings = model, store, pairs, settings
        self._seed, self._accelerator, self._loss = seed, accelerator, loss
        self._timesteps = timesteps
        self.noise_draws, self._cache, self._start = noise_draws, cache, state
        self._weighs = type(loss).pair_weights is not Loss.pair_weights or any(
            store.records[pair].weight != 1 for pair in pairs
        )
        # A step does not wait for the disk or the network.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pairs")
        self._pending: Future[StepInputs] | None = None

    def inputs(self, step: int) -> Iterator[StepInputs]:
        """Inputs of the forward passes of a step, on the device; the next ones are read ahead."""
        for part in range(self._settings.gradient_accumulation_steps):
            pending, self._pending = self._pending, None
            inputs = pending.result() if pending else self._read(step, part)
            last = part == self._settings.gradient_accumulation_steps - 1
            following = (step + 1, 0) if last else (step, part + 1)
            if following[0] < self._settings.steps:
                self._pending = self._reader.submit(self._read, *following)
            yield self._to_device(inputs)

    def position(self, step: int) -> int:
        """The first position of a step in the endless sequence of pairs."""
        settings = self._settings
        pairs = settings.gradient_accumulation_steps * settings.batch_size
        steps = step - self._start.step
        return self._start.position + steps * pairs * self._accelerator.num_processes

    def draw_at(self, position: int) -> PairDraw:
        """The pair and the draw at a position: each pair once per epoch, with its next draw."""
        epoch, index = divmod(position, len(self._pairs))
        order = _permutation(len(self._pairs), self._seed, epoch)
        draw = epoch if self.noise_draws is None else epoch % self.noise_draws
        return PairDraw(self._pairs[order[index]], draw)

    def fill_cache(
        self,
        predict: Callable[[StepInputs], Latents],
        on_progress: Callable[[ReferenceCacheReport], None],
        stop: Callable[[], bool],
        *,
        together: bool = False,
    ) -> bool:
        """Add the predictions that the run needs to the cache; False if stopped before the end.

        Each process predicts its share. With `together` all processes predict equally often, as
        sharded weights need it, and `stop` must return the same in all of them.
        """
        if self._cache is None or self.noise_draws is None:
            return True
        world, rank = self._accelerator.num_processes, self._accelerator.process_index
        count = min(self.position(self._settings.steps), self.noise_draws * len(self._pairs))
        draws = [self.draw_at(position) for position in range(rank, count, world)]
        if together and not draws:
            draws = [self.draw_at(0)]  # of another process too, to predict with it
        done = self._cache.fill(
            draws,
            lambda draw: predict(self._to_device(self._load([draw]))),
            on_progress,
            stop,
            (rank, world),
            self._largest if together else None,
        )
        if done:
            self._accelerator.wait_for_everyone()
        return done

    def _largest(self, number: int) -> int:
        """The largest of the numbers that all processes pass."""
        numbers = torch.tensor(float(number), device=self._accelerator.device)
        return int(self._accelerator.reduce(numbers, reduction="max"))

    def _read(self, step: int, part: int) -> StepInputs:
        """The inputs of one forward pass of this process, on the CPU."""
        world, rank = self._accelerator.num_processes, self._accelerator.process_index
        size = self._settings.batch_size
        first = self.position(step) + (part * world + rank) * size
        draws = [self.draw_at(position) for position in range(first, first + size)]
        inputs = replace(self._load(draws), weight=self._weights(step, first))
        if self._cache is not None:
            inputs = replace(inputs, reference_prediction=self._cache.read(draws))
        on_gpu = self._accelerator.device.type == "cuda"
        return inputs.mapped(Tensor.pin_memory) if on_gpu else inputs

    def _weights(self, step: int, first: int) -> PerPair | None:
        """Weights of the pairs of one forward pass, which starts at the position `first`."""
        if not self._weighs:
            return None
        start = self.position(step)
        pairs = [self.draw_at(each).pair for each in range(start, self.position(step + 1))]
        weights = checked(
            self._loss,
            "weights of pairs",
            self._loss.pair_weights(torch.stack([self._store.preference(pair) for pair in pairs])),
            (len(pairs),),
            within=(0, torch.inf),
        ) * torch.tensor([self._store.records[pair].weight for pair in pairs])
        return (weights / weights.mean())[first - start :][: self._settings.batch_size]

    def _load(self, draws: Sequence[PairDraw]) -> StepInputs:
        batch = self._store.batch([draw.pair for draw in draws])
        if not self._loss.sees_groups:
            batch = batch.as_pairs()
        noises, timesteps = [], []
        for draw in draws:
            source = generator(self._seed, "draw", draw.pair, draw.draw)
            noises.append(torch.randn(self._model.latent_shape, generator=source))
            drawn = self._timesteps(self._model, 1, source)
            timesteps.append(
                checked(
                    self._timesteps, "timesteps", drawn, (1,), within=(0, math.inf), device="cpu"
                )
            )
        noise = torch.stack(noises).to(batch.first.dtype)
        return StepInputs(batch=batch, noise=noise, timestep=torch.cat(timesteps))

    def _to_device(self, inputs: StepInputs) -> StepInputs:
        """Copies from pinned memory are asynchronous."""
        device = self._accelerator.device
        return inputs.mapped(lambda tensor: tensor.to(device, non_blocking=True))


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist()
    return order
