"""Predict the memory of everything besides the training step: building, sampling, decoding.

Each part is traced on shapes, as the step is (`dpo_video.estimation.tracing`): the text encoder,
the VAE's encoder and decoder, and one guided step of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo_video.estimation.estimate import LAYERS
from dpo_video.estimation.modes import MemoryMode
from dpo_video.estimation.results import MemoryEstimate, PhaseEstimate
from dpo_video.estimation.tracing import (
    CPU,
    DTYPES,
    TraceCache,
    allocated,
    frozen_parts,
    give_tensors,
    network_bytes,
    parked_bytes,
    storage_of,
)
from dpo_video.memory.modes import apply_memory_modes
from dpo_video.memory.packed_weights import pack_frozen_weights
from dpo_video.memory.peak import Peak, peak_bytes
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import Backbone, VideoModel
from dpo_video.support.memoryless import Memoryless

Prompt = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many videos a run draws, and how."""

    pairs: int
    """Pairs to build; 0 for finished pairs."""
    samples_per_pair: int
    encodes: bool
    """Whether pairs are made of real videos."""
    pair_steps: int | None
    """Sampling steps; None for the model's."""
    validation_videos: int
    """Of the whole run."""
    videos: int
    """Of an evaluation, of each model."""
    batch_size: int
    """Of an evaluation."""
    evaluation_steps: int | None

    def __str__(self) -> str:
        """The numbers in words; None of sampling steps is the model's own number."""
        own = "the model's"
        parts = [f"an evaluation of {self.videos} videos of each model, "
                 f"{self.evaluation_steps or own} sampling steps"]  # fmt: skip
        if self.validation_videos:
            parts.insert(0, f"{self.validation_videos} validation videos")
        if self.pairs:
            each = f"{self.samples_per_pair} sampled video{'s' * (self.samples_per_pair > 1)} each"
            steps = f"{self.pair_steps or own} sampling steps"
            parts.insert(0, f"{self.pairs} pairs with {each}, {steps}")
        return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A network besides the denoiser: its weights on the device, and the peak beside them."""

    weights: int
    activations: int
    flops: int


def predict_phases(
    backbone: Backbone,
    settings: TrainSettings,
    mode: MemoryMode,
    step: MemoryEstimate,
    plan: Plan,
    *,
    text_encoder_on_host: bool = False,
    traces: TraceCache | None = None,
) -> tuple[PhaseEstimate, ...]:
    """Predict the phases of a run; none for a backbone without a VAE of its own.

    Args:
        backbone: The model family, with the model and the size of its videos.
        settings: Rank and precision.
        mode: How the denoiser's weights are stored.
        step: The estimate of the training step in that mode.
        plan: The numbers of videos.
        text_encoder_on_host: Whether its blocks are kept in CPU memory.
        traces: The traces of earlier calls for the same configuration.
    """
    cache = TraceCache() if traces is None else traces
    outline = cache.outline(backbone, settings)
    depths = [None] if outline.layers is None else list(LAYERS)
    storage = storage_of(mode.model_copy(update={"shard": 1}))
    stages = [cache.stage(backbone, {}, settings, depth, storage) for depth in depths]
    model = stages[-1].model
    if not isinstance(getattr(model, "vae", None), nn.Module):
        return ()
    dtype = DTYPES[settings.mixed_precision]
    weights = [_weights(stage.policy) for stage in stages]

    def sampled(count: int) -> tuple[int, int]:
        """Bytes beside the weights, and operations, of a guided step of so many videos."""
        peaks = [
            _sampling(stage.model, stage.policy, stage.prompt, count, dtype, stage.tensors)
            for stage in stages
        ]
        return peaks[-1].total - peaks[-1].weights, _deep(
            [peak.flops for peak in peaks], outline.layers
        )

    denoiser = _deep(weights, outline.layers)
    with stages[-1].tensors, torch.no_grad():
        text = _text_encoder(model, stages[-1].prompt, text_encoder_on_host)
        vae: Any = getattr(model, "vae")  # noqa: B009 - of most models, and none of the interface
        give_tensors(vae, CPU)
        latents = torch.zeros(1, *model.latent_shape)
        shape = model.shape
        pixels = torch.zeros(1, 3, shape.frames, shape.height, shape.width)
        decode = _part(vae, partial(model.decode_videos, latents))
        encode = _part(vae, partial(model.encode_videos, pixels)) if plan.encodes else None
    one, flops = sampled(1)
    many, many_flops = (one, flops) if plan.batch_size == 1 else sampled(plan.batch_size)
    steps = model.sampling.num_inference_steps
    samples = plan.pairs * plan.samples_per_pair
    state = step.weights + step.optimizer
    built = denoiser + text.weights
    phases: list[tuple[str, int, int, int]] = []
    if plan.pairs:
        phases.append(("build: text encoder", built, text.activations, 0))
        if encode is not None:
            phases.append(
                ("build: encode", built + decode.weights, encode.activations,
                 encode.flops * plan.pairs)
            )  # fmt: skip
        phases += [
            ("build: sample", built + decode.weights, one,
             flops * samples * (plan.pair_steps or steps)),
            ("build: decode", built + decode.weights, decode.activations,
             decode.flops * (samples + 2 * plan.pairs)),
        ]  # fmt: skip
    if plan.validation_videos:
        phases += [
            ("validation videos: sample", state + decode.weights, one,
             flops * plan.validation_videos * steps),
            ("validation videos: decode", state + decode.weights, decode.activations,
             decode.flops * plan.validation_videos),
        ]  # fmt: skip
    rounds = -(-2 * plan.videos // plan.batch_size)
    phases += [
        ("evaluate: text encoder", built, text.activations, 0),
        (f"evaluate: sample, {plan.batch_size} at a time", denoiser + decode.weights, many,
         many_flops * rounds * (plan.evaluation_steps or steps)),
        ("evaluate: decode", denoiser + decode.weights, decode.activations,
         decode.flops * 2 * plan.videos),
    ]  # fmt: skip
    model.release()
    return tuple(
        PhaseEstimate(name=name, weights=held, activations=beside, flops=operations)
        for name, held, beside, operations in phases
    )


def _deep(values: Sequence[int], layers: int | None) -> int:
    """The value of a model of many equal layers, from those of LAYERS layers."""
    if layers is None:
        return values[0]
    few, more = LAYERS
    return values[0] + (layers - few) * (values[1] - values[0]) // (more - few)


def _weights(policy: nn.Module) -> int:
    """Bytes of the adapted denoiser on the device."""
    on_device = allocated(frozen_parts(policy, on_host=False))
    return network_bytes(policy) + on_device - parked_bytes(policy)


def _sampling(
    model: VideoModel,
    policy: nn.Module,
    prompt: Prompt,
    count: int,
    dtype: torch.dtype,
    tensors: Any,
) -> Peak:
    """The peak of one sampling step with classifier-free guidance, outside of autocast."""
    denoiser: Any = getattr(policy, "get_base_model")()  # noqa: B009 - of peft's model

    def step() -> None:
        noise = torch.zeros(count, *model.latent_shape)
        context = {
            name: torch.zeros(2 * count, *shape, dtype=dtype) for name, shape in prompt.items()
        }
        both = model.predict(denoiser, noise.repeat(2, 1, 1, 1, 1), torch.ones(2 * count), context)
        without, given = both.to(noise.dtype).chunk(2)
        noise + without + 5.0 * (given - without)

    with tensors, torch.no_grad():
        apply_memory_modes(policy, MemorySettings())  # those of training are left out
        return peak_bytes(
            step,
            networks=[policy],
            weights=frozen_parts(policy, on_host=False),
            host=frozen_parts(policy, on_host=True),
        )


def _text_encoder(model: VideoModel, prompt: Prompt, on_host: bool) -> _Part:
    network: Any = getattr(model, "text_encoder", None)
    if not isinstance(network, nn.Module):
        return _Part(weights=0, activations=0, flops=0)
    give_tensors(network, CPU)
    if on_host:
        pack_frozen_weights(network.requires_grad_(False), CPU, "native", on_host=True)
    length = next(iter(prompt.values()))[0]
    ids = torch.zeros(1, length, dtype=torch.long)
    with Memoryless.assumed_true():  # whether nothing is masked
        return _part(network, lambda: network(ids).last_hidden_state)


def _part(network: nn.Module, run: Callable[[], Tensor]) -> _Part:
    def once() -> None:
        run()

    peak = peak_bytes(
        once,
        networks=[network],
        weights=frozen_parts(network, on_host=False),
        host=frozen_parts(network, on_host=True),
    )
    return _Part(weights=peak.weights, activations=peak.total - peak.weights, flops=peak.flops)
