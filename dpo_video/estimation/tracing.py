"""Trace a training step on tensors without memory: its peak bytes and its operations.

The model is built on the meta device: its networks have shapes and no weights. The training step
itself (`dpo_video.training.step`) runs on tensors without memory (`dpo_video.support.memoryless`),
forward and backward, while `dpo_video.memory.peak` counts the bytes alive. So no formula stands
between prediction and step. What no tensor holds is added in `dpo_video.estimation.results`
(`FRAGMENTS`, `CONTEXT`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpo_video.diffusion.experts import Experts
from dpo_video.errors import UserError
from dpo_video.estimation.equal_blocks import EqualBlocks
from dpo_video.estimation.modes import MemoryMode
from dpo_video.estimation.replay import Replay, Replays
from dpo_video.estimation.results import MemoryEstimate
from dpo_video.memory.blocks import passes
from dpo_video.memory.cuda_autocast import cuda_autocast_rules
from dpo_video.memory.fsdp import ShardedBytes, check_shardable, sharded_bytes
from dpo_video.memory.modes import apply_memory_modes
from dpo_video.memory.offload import HostAdamW
from dpo_video.memory.packed_weights import Base, frozen_weights, pack_frozen_weights
from dpo_video.memory.peak import BLOCK, Peak, peak_bytes
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Backbone, Loss, Reference, VideoModel
from dpo_video.support.memoryless import Memoryless
from dpo_video.training.lora import adapt
from dpo_video.training.step import Step
from dpo_video.types import PairBatch, Placement

CPU = torch.device("cpu")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEEP = 12  # layers from which on tracing a few of them saves time

WeightStorage = tuple[Base, bool]
"""Quantization, and whether the weights are in CPU memory."""


@dataclass(frozen=True)
class Outline:
    """A model without its weights."""

    parameters: int
    blocks: int
    """Of a forward pass."""
    layers: int | None
    """Length of the transformer's stack, if a few of its layers are enough for a trace."""
    latent_shape: tuple[int, ...]

    @classmethod
    def of(cls, model: VideoModel) -> Self:
        """Outline a model."""
        stack = layer_stack(model.denoiser)
        return cls(
            parameters=sum(parameter.numel() for parameter in model.denoiser.parameters()),
            blocks=len(passes(model.denoiser)[0]),
            layers=None if stack is None else len(stack),
            latent_shape=model.latent_shape,
        )


class TraceCache:
    """Traces of one configuration, so that no step is traced twice."""

    def __init__(self) -> None:
        self.estimates: dict[tuple[int | None, MemoryMode], MemoryEstimate] = {}
        """Number of layers (None: all of them) and mode to estimate."""
        self._outline: Outline | None = None
        self._unused: _Loaded | None = None
        self._stages: dict[tuple[int | None, WeightStorage], _Stage] = {}

    def outline(self, backbone: Backbone, settings: TrainSettings) -> Outline:
        """The model without weights."""
        if self._outline is None:
            self._unused = _load(backbone, settings)
            self._outline = Outline.of(self._unused[0])
        return self._outline

    def stage(
        self,
        backbone: Backbone,
        references: Mapping[str, Reference],
        settings: TrainSettings,
        layers: int | None,
        weights: WeightStorage,
    ) -> _Stage:
        """The stage that steps with these references run on."""
        stage = self._stages.get((layers, weights))
        if stage is None or not references.keys() <= stage.references.keys():
            loaded, self._unused = self._unused or _load(backbone, settings), None
            stage = _Stage(loaded, references, settings, layers, weights)
            self._stages[layers, weights] = stage
        return stage

    def trainable(self, layers: int | None) -> int:
        """Parameters of the adapter, extrapolated to `layers`; 0 if nothing was traced."""
        sizes = {depth: stage.trainable for (depth, _), stage in self._stages.items()}
        if layers is None or not sizes:
            return next(iter(sizes.values()), 0)
        (few, adapter), (more, larger) = [(depth or 0, sizes[depth]) for depth in list(sizes)[:2]]
        return adapter + (layers - few) * (larger - adapter) // (more - few)


_Loaded = tuple[VideoModel, Mapping[str, tuple[int, ...]]]
"""A model on the meta device, and the shapes of a prompt."""


def _load(backbone: Backbone, settings: TrainSettings) -> _Loaded:
    model = backbone.load(Placement(CPU, DTYPES[settings.mixed_precision], on_meta=True))
    prompt = model.prompt_shapes()
    if prompt is None:
        raise UserError(
            f"{type(backbone).__name__} does not know the shapes of its prompts before it encodes "
            "one, so its memory cannot be predicted. Train a few steps and read the GiB column."
        )
    return model, prompt


def layer_stack(network: nn.Module) -> nn.ModuleList | None:
    """The transformer's list of more than DEEP equal layers; None if there is none."""
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) > DEEP:
            first, *others = ([p.shape for p in layer.parameters()] for layer in module)
            if all(other == first for other in others):
                return module
    return None


def storage_of(mode: MemoryMode) -> WeightStorage:
    """How a mode stores the frozen weights in the trace; sharding is added to it."""
    return mode.quantization, "blocks" in mode.offload and mode.shard == 1


class _Stage:
    """A model on tensors without memory, with an adapter and references, for many traces."""

    def __init__(
        self,
        loaded: _Loaded,
        references: Mapping[str, Reference],
        settings: TrainSettings,
        layers: int | None,
        weights: WeightStorage,
    ) -> None:
        quantization, on_host = weights
        self.model, self.prompt = loaded
        stack = layer_stack(self.model.denoiser)
        if layers is not None and stack is not None:
            del stack[layers:]
        with torch.device("meta"):
            self.policy = adapt(self.model, settings, seed=0)
            self.references = {name: each.attach(self.policy) for name, each in references.items()}
        self._optimizers: dict[bool, Optimizer] = {}
        self.replays, self.equal_blocks = Replays(), EqualBlocks()
        self.tensors = Memoryless()
        with self.tensors:
            give_tensors(self.policy, CPU)
            self.trained = [p for p in self.policy.parameters() if p.requires_grad]
            if quantization != "native" or on_host:
                pack_frozen_weights(self.policy, CPU, quantization, on_host=on_host)
            for each in filter(None, self.references.values()):
                each.restore(
                    {
                        name: torch.empty(value.shape, dtype=value.dtype, device=CPU)
                        for name, value in each.state().items()
                    }
                )

    @property
    def trainable(self) -> int:
        """Parameters of the adapter."""
        return sum(parameter.numel() for parameter in self.trained)

    def optimizer(self, *, on_host: bool) -> Optimizer:
        """The optimizer; from the second call on, its state exists."""
        if on_host not in self._optimizers:
            kind = HostAdamW if on_host else torch.optim.AdamW
            self._optimizers[on_host] = kind(self.trained)
        return self._optimizers[on_host]

    def trace_step(
        self, modes: Sequence[MemoryMode], loss: Loss, settings: TrainSettings
    ) -> dict[MemoryMode, MemoryEstimate]:
        """Trace a step in each mode."""
        estimates: dict[MemoryMode, MemoryEstimate] = {}
        with self.tensors:
            for memory in dict.fromkeys(mode.memory for mode in modes):
                apply_memory_modes(self.policy, memory)
                done: list[_StepTrace] = []
                for name in self.references:
                    for mode in modes:
                        if mode.reference != name or mode.memory != memory:
                            continue
                        trace = _StepTrace(self, loss, mode, settings)
                        estimates[mode] = trace.derive_from(done) or trace.run()
                        done.append(trace)
        return estimates


class _StepTrace:
    """One step on tensors without memory."""

    def __init__(
        self, stage: _Stage, loss: Loss, mode: MemoryMode, settings: TrainSettings
    ) -> None:
        self.model, self.policy, self.prompt = stage.model, stage.policy, stage.prompt
        self.reference_model = stage.references[mode.reference] if loss.needs_reference else None
        self.mode, self.settings = mode, settings
        replay = Replay(self.model, stage.replays, mode.memory, stage.trained)
        self.step = Step(
            model=replay.model(),
            policy=self.policy,
            reference_model=self.reference_model,
            loss=loss,
            mode=mode.backward,
            backward=replay.backward,
            autocast=lambda: replay.around(self._autocast()),
        )
        reference = self.policy
        if self.reference_model is not None:
            with self.reference_model.network() as reference:
                give_tensors(reference, CPU)
        self.own = reference
        if reference is self.policy:
            self.own = nn.Module()  # of what the reference has besides the policy
            state = {} if self.reference_model is None else self.reference_model.state()
            for number, value in enumerate(state.values()):
                self.own.register_buffer(str(number), value)
        self.sharded: list[ShardedBytes] = []
        if mode.shard > 1:
            for network in dict.fromkeys((self.policy, reference)):
                check_shardable(network)
                self.sharded.append(sharded_bytes(network, mode.shard))
        self.trained, self.optimizer = stage.trained, stage.optimizer
        self.equal_blocks = stage.equal_blocks
        self.done: MemoryEstimate | None = None

    @cached_property
    def unsharded(self) -> int:
        """Bytes of the weights in the trace: the policy's, and a reference's with its own."""
        packed = allocated(frozen_parts(self.policy, on_host=False))
        return network_bytes(self.policy) + network_bytes(self.own) + packed - self.parked

    @cached_property
    def weights(self) -> int:
        """Bytes of the weights on the device, with what of sharded ones is gathered at a time."""
        if not self.sharded:
            return self.unsharded
        left_out = sum(each.whole - each.parts for each in self.sharded)
        gathered = max(each.gathered for each in self.sharded)
        return self.unsharded - left_out - self.parts_on_host + gathered

    @property
    def parts_on_host(self) -> int:
        """Bytes of sharded weights in CPU memory."""
        return sum(each.parts_of_blocks for each in self.sharded) * ("blocks" in self.mode.offload)

    @cached_property
    def parked(self) -> int:
        """Bytes of the expert that is not in use, without its adapter."""
        return parked_bytes(self.policy)

    @cached_property
    def is_a_copy(self) -> bool:
        """Whether the reference is the policy, or a copy of it without the adapter."""
        adapter = allocated(self.trained)
        return network_bytes(self.own) in (0, network_bytes(self.policy) - adapter)

    def derive_from(self, done: Sequence[_StepTrace]) -> MemoryEstimate | None:
        """Derive the estimate from a trace of another reference; None if that is not possible.

        A copy computes what the policy without its adapter does, on its own weights. A cached
        reference leaves out a forward pass, whose peak lies below that of the step.
        """
        if self.reference_model is None:
            return None
        for other in done:
            if other.done is None or not (self.is_a_copy and other.is_a_copy):
                continue
            if other.reference_model is None:
                continue
            traced = other.done
            if self.reference_model.noise_draws is None:
                if traced.fresh:
                    self.done = traced.model_copy(
                        update={"mode": self.mode, "weights": self.weights}
                    )
            elif traced.fresh:
                left_out = other.reference_alone()
                alone = left_out.total - self.parked - self.unsharded + self.weights
                if alone < traced.tensors:
                    self.done = traced.model_copy(
                        update={
                            "mode": self.mode,
                            "weights": self.weights,
                            "fresh": False,
                            "flops": traced.flops - left_out.flops,
                        }
                    )
            if self.done is not None:
                return self.done
        return None

    def reference_alone(self) -> Peak:
        """Peak and operations of the reference's forward passes of one pair alone."""
        batch, noise, timestep = empty_pairs(self.model, self.prompt, 1, self.dtype)
        with self._choices():
            return peak_bytes(
                lambda: _discard(self.step.reference(batch, noise, timestep)),
                networks=[self.policy, self.own],
            )

    def run(self) -> MemoryEstimate:
        """Run the step and read its peak."""
        on_host = "optimizer" in self.mode.offload
        optimizer = self.optimizer(on_host=on_host)
        gradients = self._gradients_before()
        count = self.settings.batch_size
        batch, noise, timestep = empty_pairs(self.model, self.prompt, count, self.dtype)
        draws = None if self.reference_model is None else self.reference_model.noise_draws
        cached = None if draws is None else torch.cat([noise, noise])
        # The linear backward pass checks the loss's slopes.
        checks = Memoryless.assumed_true() if self.mode.backward == "linear" else nullcontext()
        with self._choices(), checks:
            peak = peak_bytes(
                lambda: _discard(self.step(batch, noise, timestep, reference_prediction=cached)),
                networks=[self.policy, self.own, gradients],
                optimizer=optimizer,
                weights=frozen_parts(self.policy, on_host=False),
                host=frozen_parts(self.policy, on_host=True),
            )
        adapter = sum(p.nbytes for p in self.trained)
        for parameter in self.trained:
            parameter.grad = None
        state = 0
        if not on_host:
            state = sum(value.nbytes for of in optimizer.state.values() for value in of.values())
        self.done = MemoryEstimate(
            mode=self.mode,
            fresh=cached is None,
            weights=self.weights,
            gradients=adapter,
            optimizer=state,
            activations=max(0, peak.total - self.parked - self.unsharded - adapter - state),
            flops=peak.flops // self.settings.batch_size,
            host=peak.host + self.parts_on_host,
        )
        return self.done

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the forward passes."""
        return DTYPES[self.settings.mixed_precision]

    @property
    def _mixed(self) -> bool:
        return self.dtype != torch.float32

    def _autocast(self) -> AbstractContextManager[Any]:
        """Autocast of each forward pass, as in training."""
        return torch.autocast("cpu", self.dtype, enabled=self._mixed)

    @contextmanager
    def _choices(self) -> Iterator[None]:
        chunks = self.mode.forward_chunks
        with (
            cuda_autocast_rules() if self._mixed else nullcontext(),
            # Off by up to 1%, where whole passes are exact; but chunks take the longest to trace.
            self.equal_blocks.counted(chunks) if chunks > 1 else nullcontext(),
        ):
            yield

    def _gradients_before(self) -> nn.Module:
        """Gradients of the earlier batches of an optimizer step, if there are any."""
        holder = nn.Module()
        if self.settings.gradient_accumulation_steps > 1:
            for index, parameter in enumerate(self.trained):
                parameter.grad = torch.zeros_like(parameter)
                holder.register_buffer(str(index), parameter.grad)
        return holder


def empty_pairs(
    model: VideoModel, prompt: Mapping[str, tuple[int, ...]], count: int, dtype: torch.dtype
) -> tuple[PairBatch, Tensor, Tensor]:
    """Empty pairs, noise and timesteps in the shapes of a training step.

    Args:
        model: Gives the latent shape and the device.
        prompt: Shapes of an encoded prompt.
        count: Number of pairs.
        dtype: Precision of the encoded prompts.
    """
    size, device = (count, *model.latent_shape), model.device
    batch = PairBatch(
        first=torch.zeros(size),
        second=torch.zeros(size),
        preference=torch.ones(count, size[2]),
        region=torch.ones(count, 1, *size[2:]),
        strength=torch.ones(count),
        context={name: torch.zeros(count, *each, dtype=dtype) for name, each in prompt.items()},
        keys=[""] * count,
    )
    return batch.to(device), torch.zeros(size, device=device), torch.ones(count, device=device)


def give_tensors(network: nn.Module, device: torch.device) -> None:
    """Replace a network's meta tensors by empty tensors on a device.

    Under `Memoryless` these have a device and no memory.
    """
    shared: dict[int, nn.Parameter] = {}  # a text encoder has two names for its embedding
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if id(parameter) not in shared:
                    made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    shared[id(parameter)] = nn.Parameter(made, parameter.requires_grad)
                setattr(module, name, shared[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                empty = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
                setattr(module, name, empty)


def frozen_parts(network: nn.Module, *, on_host: bool) -> list[Tensor]:
    """Stored tensors of packed or offloaded weights, on the device or in CPU memory."""
    found = (each for each in frozen_weights(network) if each.on_host == on_host)
    return [part for each in found for part in each.parts]


def parked_bytes(policy: nn.Module) -> int:
    """Bytes of the expert that is not in use, without its adapter."""
    return allocated(
        tensor
        for experts in policy.modules()
        if isinstance(experts, Experts) and experts.park
        for name, tensor in experts.transformer_2.named_parameters()
        if ".lora_" not in name
    )


def network_bytes(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return allocated((*network.parameters(), *network.buffers()))


def allocated(tensors: Iterable[Tensor]) -> int:
    """Bytes rounded up to the allocator's blocks."""
    return sum(BLOCK * math.ceil(tensor.nbytes / BLOCK) for tensor in tensors)


def _discard(result: object) -> None:
    """Drop a result, so that its tensors are freed within the trace."""
