"""The entry to training: prepares a run, drives its loop and calls its listeners."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from dpo_video import registry
from dpo_video.data.store import PairStore
from dpo_video.errors import TrainingError
from dpo_video.extensions import Listener, ListenerFactory, Optimizer, Schedule, TimestepSampler
from dpo_video.memory.compile import check_compile
from dpo_video.memory.fsdp import shard_frozen_weights
from dpo_video.memory.modes import apply_memory_modes
from dpo_video.registry.attribution import made_by
from dpo_video.registry.returned import wrong
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import Loss, Reference, ReferenceModel, VideoModel
from dpo_video.support.report import StepEvent
from dpo_video.support.rng import derive
from dpo_video.training.checkpoint import (
    Checkpoint,
    RunFingerprint,
    check_unchanged,
    newest_checkpoint,
    restore,
)
from dpo_video.training.listeners import (
    CheckpointWriter,
    EncodedPrompt,
    LogWriter,
    SkipLimit,
    TrackerLogger,
    ValidationVideos,
    named,
)
from dpo_video.training.loop import Run, optimize
from dpo_video.training.lora import adapt
from dpo_video.training.optimizer import check_offload, make_optimizer
from dpo_video.training.reference_cache import (
    ReferenceCache,
    ReferenceCacheManifest,
    ReferenceCacheReport,
)
from dpo_video.training.run_dir import read_log
from dpo_video.training.sampler import PairSampler, trainable_pairs
from dpo_video.training.step import Step, check_backward
from dpo_video.types import Prompt


def check_without_reference(loss: Loss) -> None:
    """Refuse a loss that says nothing without a reference.

    Raises:
        TrainingError: for a loss such as `kto`, which judges each video by its change.
    """
    if loss.needs_reference and not loss.reference_free:
        raise TrainingError(
            f"The loss {registry.name_of(loss)} judges a video by its change against a reference. "
            "Choose one: --reference toggle"
        )


def train(
    model: VideoModel,
    store: PairStore,
    loss: Loss,
    reference: Reference,
    settings: TrainSettings,
    *,
    seed: int,
    out: Path,
    accelerator: Accelerator,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 - it is frozen
    timesteps: TimestepSampler | None = None,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    resume: bool | Checkpoint = False,
    options: Mapping[str, Any] | None = None,
    on_ready: Callable[[int], None] = lambda step: None,
    on_reference_cache: Callable[[ReferenceCacheReport], None] = lambda report: None,
    stop: Callable[[], bool] = lambda: False,
    validation_prompts: Sequence[Prompt] = (),
    listeners: Sequence[Listener | ListenerFactory] = (),
) -> Iterator[StepEvent]:
    """Train an adapter; one event per optimizer step.

    Args:
        model: The model, frozen.
        store: The pairs; those that are ties in every frame are never drawn.
        loss: The loss.
        reference: Where the reference's predictions come from. If it limits the draws per pair, its
            predictions are cached before the first step.
        settings: Table [train].
        seed: Seed of the adapter, the order of the pairs, the noise and the timesteps.
        out: The run's folder.
        accelerator: Device, precision, processes and trackers.
        memory: Table [memory].
        timesteps: Draws the timesteps; the built-in `family` by default.
        optimizer: Makes the optimizer; the built-in `adamw` by default.
        schedule: The learning rate over the steps; the built-in `linear` by default.
        resume: Continue from this checkpoint; True stands for the newest undamaged one in `out`.
        options: The run's options by path, to be kept in its checkpoints.
        on_ready: Receives the step that the run starts from, once everything was checked and before
            anything is written.
        on_reference_cache: Receives the progress of filling the reference cache.
        stop: Called before every forward pass, or with several processes before every step. Once it
            is true in any process, the completed steps are saved and the events end.
        validation_prompts: Prompts of the validation videos, one each; those of the first pairs by
            default. They are encoded before the adapter exists.
        listeners: Called at the start, after every step and checkpoint, and at the end.

    Raises:
        TrainingError: if all pairs are ties or lack what the loss needs, if the loss does not
            support `memory.backward`, if a block cannot be compiled, at a first step whose margin
            is not exactly 0 although the reference is exact, and when more than `settings.skips`
            steps were not finite.
        RunError: if there is nothing to resume, or the reference or the pairs have changed.
    """
    store.check_fits(model)
    own_listeners = named(listeners)
    checkpoint = newest_checkpoint(out) if resume is True else resume or None
    if checkpoint:  # another run may have added pairs since
        store = store.beginning(checkpoint.manifest.fingerprint.count)
    timesteps = timesteps or registry.strategy("timesteps", "family")
    optimizer = optimizer or registry.strategy("optimizer", "adamw")
    schedule = schedule or registry.strategy("schedule", "linear")
    check_backward(loss, memory)
    check_offload(optimizer, memory)
    check_compile(memory, accelerator.device)
    pairs = trainable_pairs(store, loss, model, settings)
    shown = validation_prompts[: settings.validation_videos]
    encoded = [EncodedPrompt.of(prompt, model) for prompt in shown]
    if settings.validation_videos:  # sampling them must not load the text encoder again
        own = (options or {}).get("backbone.negative_prompt", "")
        if (negative := store.negative_context()) is not None and store.negative_prompt == own:
            model.keep_negative(negative)
        model.negative_context()
    model.release()  # the encoders
    policy = adapt(model, settings, seed)
    fingerprint = RunFingerprint.of(model, store, policy, accelerator.mixed_precision)
    # adapt() has seeded torch; a plugin's draws from these two must not differ between runs.
    random.seed(derive(seed, "python"))
    np.random.seed(derive(seed, "numpy") % 2**32)
    apply_memory_modes(policy, memory)
    reference_model = reference.attach(policy) if loss.needs_reference else None
    if not isinstance(reference_model, (ReferenceModel, type(None))):
        raise wrong(reference, f"attaches a {type(reference_model).__name__}, no ReferenceModel")
    if reference_model is None:
        check_without_reference(loss)
    if memory.shard > 1:
        # The base model: validation videos call it without the policy around it.
        networks = [policy.get_base_model()]
        if reference_model is not None:
            with reference_model.network() as own:
                networks += [] if own is policy else [own]
        shard_frozen_weights(
            networks, memory.shard, accelerator.device, on_host="blocks" in memory.offload
        )
    parameters = [p for p in policy.parameters() if p.requires_grad]
    # DistributedDataParallel takes no sharded weights: `Step.average` does its work then.
    network = accelerator.prepare_model(
        policy,
        device_placement=memory.shard == 1,
        evaluation_mode=memory.shard > 1,
    )
    prepared = accelerator.prepare_optimizer(
        make_optimizer(optimizer, parameters, settings, memory)
    )
    gradient = Step(
        model=model,
        policy=network,
        reference_model=reference_model,
        loss=loss,
        mode=memory.backward,
        backward=accelerator.backward,
        autocast=accelerator.autocast,
    )
    run = Run(
        model=model, store=store, policy=policy, network=network, optimizer=prepared,
        settings=settings, memory=memory, accelerator=accelerator, out=out, fingerprint=fingerprint,
        options=options or {},
        reference_model=reference_model,
        starts_as_reference=reference_model is not None and reference.exact,
    )  # fmt: skip
    if checkpoint:
        check_unchanged(checkpoint, fingerprint)
        run.state = restore(
            checkpoint, policy, prepared, accelerator.scaler, reference_model, own_listeners
        )
        before = [each for each in read_log(out) if each.step <= run.state.step]
        run.seconds = before[-1].seconds if before else 0.0
    if (
        loss.sees_groups and store.has_groups and reference_model is not None
        and reference_model.noise_draws is not None
    ):  # fmt: skip
        raise TrainingError(
            "The reference's cache holds predictions of two videos, and this loss compares whole "
            "groups. Choose another reference: --reference toggle"
        )
    cache = None
    noise_draws = None if reference_model is None else reference_model.noise_draws
    if noise_draws is not None:
        with accelerator.main_process_first():
            manifest = ReferenceCacheManifest.of(
                model,
                seed,
                accelerator.mixed_precision,
                gradient.videos_at_once,
                memory.forward_chunks,
                compiled=memory.compile == "on",
                adapter=fingerprint.adapter if settings.init_from else "none",
                timesteps=_drawn_by(timesteps),
            )
            cache = ReferenceCache(store, manifest)
    on_ready(run.state.step)
    sampler = PairSampler(
        model, store, pairs, loss, settings, seed=seed, accelerator=accelerator, state=run.state,
        timesteps=timesteps, noise_draws=noise_draws, cache=cache,
    )  # fmt: skip
    agreed = _agreed(stop, accelerator)
    if run.state.step < settings.steps and not sampler.fill_cache(
        lambda inputs: gradient.reference(inputs.batch, inputs.noise, inputs.timestep),
        on_reference_cache,
        stop if memory.shard == 1 else lambda: agreed(0),
        together=memory.shard > 1,
    ):
        return
    called = [
        SkipLimit(), LogWriter(), *own_listeners.values(), CheckpointWriter(own_listeners),
        ValidationVideos(encoded), TrackerLogger(),
    ]  # fmt: skip
    for listener in called:
        listener.on_train_begin(run)
    for event in optimize(run, sampler, gradient, schedule, agreed):
        for listener in called:
            listener.on_step_end(event)
        yield replace(event, ended=run.ended)
        if run.ended:
            break
    for listener in called:
        listener.on_train_end()


def _drawn_by(timesteps: TimestepSampler) -> str:
    """What draws the timesteps, for the reference cache; "" for the backbone's distribution."""
    if registry.name_of(timesteps) == "family":
        return ""
    cls, options = type(timesteps), timesteps.model_dump(mode="json")
    return json.dumps([cls.__module__, cls.__qualname__, options, made_by(timesteps)])


def _agreed(stop: Callable[[], bool], accelerator: Accelerator) -> Callable[[int], bool]:
    """Whether to stop before a pass of a step: whether any process is to.

    Several processes stop before the first pass of a step only, since none may wait for another
    that has ended.
    """

    def stops(index: int) -> bool:
        if accelerator.num_processes == 1:
            return stop()
        if index > 0:
            return False
        stopped = torch.tensor(float(stop()), device=accelerator.device)
        return bool(accelerator.reduce(stopped, reduction="sum"))

    return stops
