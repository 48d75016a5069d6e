"""What a training step will need, told from the model's configuration alone.

The model is loaded on the meta device (`Placement.on_meta`): its networks have shapes and no
weights. On them the training's own step runs, forward and backward, with tensors that have no
memory either, while
dpo_video.memory.peak counts what would be alive. So no formula of ours stands between the
prediction and the step. What no tensor holds is added as stated here (`FRAGMENTS`, `CONTEXT`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from dpo_video.diffusion.experts import Experts
from dpo_video.errors import UserError
from dpo_video.memory.blocks import passes
from dpo_video.memory.modes import apply_memory_modes
from dpo_video.memory.offload import HostAdamW
from dpo_video.memory.packed_weights import Base, frozen_weights, pack_frozen_weights
from dpo_video.memory.peak import BLOCK, Peak, choosing_as_cuda, peak_bytes
from dpo_video.memory.sharding import Shard
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import Backbone, Loss, Reference, VideoModel
from dpo_video.support.statistics import Record
from dpo_video.training.lora import adapt
from dpo_video.training.step import Step
from dpo_video.types import PairBatch, Placement

GIB = 2**30
CPU = torch.device("cpu")
# Assumptions, which benchmarks/estimate_check.py measures where there is a GPU.
FRAGMENTS = 0.05  # of the activations: what the caching allocator loses to holes
CONTEXT = 0.6 * GIB  # CUDA's own context, kernels and libraries' workspaces
EFFICIENCY = 0.35  # of a card's published operations per second that a step of ours reaches

# A transformer's layers are all alike, so what it needs grows by the same with each from the second
# on: it is run with so many. (Of Wan 14B, 3 and 5 layers say the same in every mode of `ladder`.)
# Of layers that are checkpointed and layers that are not, each kind has a growth of its own, which
# one more layer shows.
LAYERS = (2, 3)
DEEP = 12  # layers, from which on that spares time
CHUNKS = 8  # of the modes that need least: from there on, other tensors are the widest

Checkpointing = Literal["none", "blocks"] | int
"""A number is that of the blocks."""
Backward = Literal["joint", "split", "linear"]
CHECKPOINTINGS: tuple[Literal["none", "blocks"], ...] = ("none", "blocks")
BACKWARDS: tuple[Backward, ...] = ("joint", "linear", "split")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@final
class MemoryMode(Record):
    """A way to run the step."""

    reference: str
    """Its name."""
    checkpointing: Checkpointing
    backward: Backward
    forward_chunks: int = 1
    offload: tuple[str, ...] = ()
    quantization: Base = "native"
    shard: int = 1

    @property
    def memory(self) -> MemorySettings:
        """The options that ask for it."""
        return MemorySettings.model_validate(self.model_dump(exclude={"reference"}))

    def __str__(self) -> str:
        """In few words."""
        again = self.checkpointing
        parts = [self.reference, f"{again} blocks" if isinstance(again, int) else again]
        parts += [self.backward]
        parts += [f"forward_chunks={self.forward_chunks}"] if self.forward_chunks > 1 else []
        parts += [f"offload={','.join(self.offload)}"] if self.offload else []
        parts += [f"shard={self.shard}"] if self.shard > 1 else []
        return " ".join(parts + ([self.quantization] if self.quantization != "native" else []))


@final
class MemoryEstimate(Record):
    """What the step needs in a mode, at its worst moment. Bytes are predicted, not measured."""

    mode: MemoryMode
    fresh: bool
    """Whether every visit to a pair has a noise of its own; False for a reference made ahead."""
    weights: int
    """Bytes of the denoiser, its adapter, and the reference where it has weights of its own."""
    gradients: int
    """Bytes of the adapter's gradients."""
    optimizer: int
    """Bytes of AdamW's state."""
    activations: int
    """Bytes of all other tensors."""
    flops: int
    """Operations of a pair, forward and backward, reference included."""
    host: int = 0
    """Bytes in the host's memory."""

    @property
    def tensors(self) -> int:
        """Bytes that tensors hold: what torch.cuda.max_memory_allocated would report."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def card(self) -> int:
        """Bytes that a card must have."""
        return round(self.tensors + FRAGMENTS * self.activations + CONTEXT)

    def seconds(self, tflops: float, efficiency: float = EFFICIENCY) -> float:
        """Of a pair, on a card of so many 10^12 operations per second."""
        return self.flops / (tflops * 1e12 * efficiency)


@final
class Forecast(Record):
    """What a model's training needs, mode by mode."""

    predicted: Literal[True] = True
    """Nothing here was measured."""
    parameters: int
    """Of the denoiser."""
    trainable: int
    """Of the adapter."""
    latent_shape: tuple[int, int, int, int]
    """`(c, f, h, w)` of one video."""
    blocks: int
    """That a forward pass goes through, and that can be checkpointed."""
    precision: str
    pairs: int
    """That the whole run visits: steps, accumulation and batch."""
    needs: tuple[MemoryEstimate, ...]

    def of(self, mode: MemoryMode) -> MemoryEstimate | None:
        """What a mode needs; None if it was not asked about."""
        return next((need for need in self.needs if need.mode == mode), None)

    def hours(self, need: MemoryEstimate, tflops: float, efficiency: float = EFFICIENCY) -> float:
        """Of the run in that mode, with nothing but its steps counted."""
        return self.pairs * need.seconds(tflops, efficiency) / 3600

    def best(self, memory: float) -> MemoryEstimate | None:
        """The fastest mode with fresh noises that a card of so many bytes holds.

        Modes that change the numbers (another base) come last, and among equally fast ones those
        that need the host's memory. None if none fits.
        """
        fitting = [need for need in self.needs if need.fresh and need.card <= memory]
        return min(
            fitting,
            key=lambda need: (need.mode.quantization != "native", need.flops, need.host),
            default=None,
        )


def candidate_modes(references: Sequence[str], loss: Loss) -> list[MemoryMode]:
    """The modes worth comparing, from the one that needs most to those that need least.

    The loss decides which backward pass holds one video's graph at the least cost.
    """
    one = "linear" if loss.linear_in_mean_error else "split"
    modes = [
        MemoryMode(reference=name, checkpointing="none", backward="joint") for name in references
    ]
    tight: dict[str, Any] = {"checkpointing": "blocks", "backward": "split", "chunks": CHUNKS}
    least = ("checkpoints", "optimizer")
    rows: list[dict[str, Any]] = [
        {"checkpointing": "none", "backward": one},
        {"checkpointing": "blocks", "backward": "joint"},
        *({"checkpointing": "blocks", "backward": each} for each in dict.fromkeys((one, "split"))),
        tight,
        {**tight, "offload": ("checkpoints",)},
        {**tight, "offload": (*least, "blocks")},
        {**tight, "offload": least, "base": "nf4"},
    ]
    return modes + [MemoryMode(reference=references[0], **row) for row in rows]


def forecast(
    backbone: Backbone,
    references: Mapping[str, Reference],
    loss: Loss,
    settings: TrainSettings,
    *,
    checkpointings: Sequence[Checkpointing] = CHECKPOINTINGS,
    backwards: Sequence[Backward] = BACKWARDS,
    modes: Sequence[MemoryMode] | None = None,
    traces: TraceCache | None = None,
) -> Forecast:
    """Run the training's step on shapes, in every mode asked for.

    Args:
        backbone: The family, with the model and the size of its videos.
        references: By the name that `Mode.reference` gives them.
        loss: Of the run. Modes that it cannot be trained in are left out.
        settings: Rank, precision and batch shape the step.
        checkpointings: To predict, with every reference and backward pass, if no modes are given.
        backwards: The same.
        modes: To predict, instead.
        traces: What earlier calls for the same configuration have run, which spares it; what
            this one runs is added.

    Raises:
        UserError: if the model's configuration cannot be read or the backbone has no prompt shapes.
    """
    ran = TraceCache() if traces is None else traces
    model = ran.outline(backbone, settings)
    parameters = sum(parameter.numel() for parameter in model.denoiser.parameters())
    asked = modes or [
        MemoryMode(reference=name, checkpointing=checkpointing, backward=backward)
        for checkpointing in checkpointings
        for backward in sorted(backwards, key=BACKWARDS.index)
        for name in references
    ]
    asked = [mode for mode in asked if mode.backward != "linear" or loss.linear_in_mean_error]
    stack = _stack(model.denoiser)
    plans = [_plan(mode, None if stack is None else len(stack)) for mode in asked]
    wanted: dict[tuple[int | None, _Weights], list[MemoryMode]] = {}
    for layers, mode in dict.fromkeys((term.layers, term.mode) for plan in plans for term in plan):
        if (layers, mode) not in ran.of:
            wanted.setdefault((layers, _weights_of(mode)), []).append(mode)
    for (layers, weights), missing in wanted.items():
        stage = ran.stage(backbone, references, settings, layers, weights)
        needs = stage.trace_step(missing, loss, settings)
        ran.of.update({(layers, mode): need for mode, need in needs.items()})
    return Forecast(
        parameters=parameters,
        trainable=ran.adapter(None if stack is None else len(stack)),
        latent_shape=model.latent_shape,
        blocks=len(passes(model.denoiser)[0]),
        precision=settings.mixed_precision,
        pairs=settings.steps * settings.gradient_accumulation_steps * settings.batch_size,
        needs=tuple(_sum(mode, plan, ran.of) for mode, plan in zip(asked, plans, strict=True)),
    )


_Weights = tuple[Base, bool, int]


class TraceCache:
    """What was run on shapes for one configuration, and on what: what is known is not run again."""

    def __init__(self) -> None:
        self.of: dict[tuple[int | None, MemoryMode], MemoryEstimate] = {}
        """By layers (None: all that there are) and mode."""
        self._model: VideoModel | None = None
        self._stages: dict[tuple[int | None, _Weights], _Stage] = {}

    def outline(self, backbone: Backbone, settings: TrainSettings) -> VideoModel:
        """The model without weights."""
        if self._model is None:
            self._model, _ = _outline(backbone, settings)
        return self._model

    def stage(
        self,
        backbone: Backbone,
        references: Mapping[str, Reference],
        settings: TrainSettings,
        layers: int | None,
        weights: _Weights,
    ) -> _Stage:
        """What steps with those references run on."""
        stage = self._stages.get((layers, weights))
        if stage is None or not references.keys() <= stage.anchors.keys():
            stage = _Stage(backbone, references, settings, layers, weights)
            self._stages[layers, weights] = stage
        return stage

    def adapter(self, layers: int | None) -> int:
        """Parameters of an adapter, which grows by the same with every layer; 0 if none ran."""
        sizes = {depth: stage.trainable for (depth, _), stage in self._stages.items()}
        if layers is None or not sizes:
            return next(iter(sizes.values()), 0)
        (few, adapter), (more, larger) = [(depth or 0, sizes[depth]) for depth in list(sizes)[:2]]
        return adapter + (layers - few) * (larger - adapter) // (more - few)


@dataclass(frozen=True)
class _Term:
    """What a model of so many layers needs in a mode, taken so many times."""

    layers: int | None
    mode: MemoryMode
    times: int


def _plan(mode: MemoryMode, layers: int | None) -> list[_Term]:
    """What a model of many equal layers needs, as a sum of what one of few layers does.

    Every figure grows by the same with each layer that is checkpointed, and by the same with each
    that is not: at the worst moment, the last checkpointed layer's backward pass, all of both kinds
    before it are held. Only where one end is not checkpointed is that another moment.
    """
    count = mode.checkpointing
    if layers is None:
        return [_Term(None, mode, 1)]
    few, more = LAYERS

    def line(
        fewer: tuple[int, MemoryMode], another: tuple[int, MemoryMode], times: int
    ) -> list[_Term]:
        return [_Term(*fewer, -times), _Term(*another, times)]

    def so_many(count: int) -> MemoryMode:
        return mode.model_copy(update={"checkpointing": count})

    if not isinstance(count, int) or count >= layers:
        full = mode if not isinstance(count, int) else so_many(more)
        return [_Term(more, full, 1), *line((few, full), (more, full), layers - more)]
    plain = layers - count
    if count == 1:
        start = few, so_many(1)
        return [_Term(*start, 1), *line(start, (more, so_many(1)), plain - 1)]
    start = more, so_many(2)
    return [
        _Term(*start, 1),
        *line(start, (more + 1, so_many(2)), plain - 1),
        *line(start, (more + 1, so_many(3)), count - 2),
    ]


def _sum(
    mode: MemoryMode, plan: Sequence[_Term], found: Mapping[Any, MemoryEstimate]
) -> MemoryEstimate:
    first = found[plan[0].layers, plan[0].mode]
    update: dict[str, Any] = {"mode": mode}
    for figure in ("weights", "gradients", "optimizer", "activations", "flops", "host"):
        update[figure] = sum(
            term.times * getattr(found[term.layers, term.mode], figure) for term in plan
        )
    return first.model_copy(update=update)


def _outline(
    backbone: Backbone, settings: TrainSettings, layers: int | None = None
) -> tuple[VideoModel, Mapping[str, tuple[int, ...]]]:
    """The model without weights, and what a prompt looks like; with so many layers in its stack."""
    model = backbone.load(Placement(CPU, DTYPES[settings.mixed_precision], on_meta=True))
    prompt = model.prompt_shapes()
    if prompt is None:
        raise UserError(
            f"{type(backbone).__name__} cannot say what its prompts look like without encoding "
            "one, so its memory cannot be predicted. Train a few steps and read GiB off the table."
        )
    stack = _stack(model.denoiser)
    if layers is not None and stack is not None:
        del stack[layers:]
    return model, prompt


def _stack(network: nn.Module) -> nn.ModuleList | None:
    """The list of many equal layers that a transformer is; None where there is none."""
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) > DEEP:
            first, *others = ([p.shape for p in layer.parameters()] for layer in module)
            if all(other == first for other in others):
                return module
    return None


def _weights_of(mode: MemoryMode) -> _Weights:
    """How a mode holds the frozen weights: base, on the host or not, how many share them."""
    return mode.quantization, "blocks" in mode.offload, mode.shard


class _Stage:
    """A model on tensors without memory, with an adapter and references, for many rehearsals."""

    def __init__(
        self,
        backbone: Backbone,
        references: Mapping[str, Reference],
        settings: TrainSettings,
        layers: int | None,
        weights: _Weights,
    ) -> None:
        quantization, on_host, processes = weights
        self.model, self.prompt = _outline(backbone, settings, layers)
        with torch.device("meta"):
            self.policy = adapt(self.model, settings, seed=0)
            self.anchors = {name: each.attach(self.policy) for name, each in references.items()}
        self._optimizers: dict[bool, Optimizer] = {}
        self._tensors = FakeTensorMode(allow_non_fake_inputs=True)
        with self._tensors:
            give_tensors(self.policy, CPU)
            self.trained = [p for p in self.policy.parameters() if p.requires_grad]
            if quantization != "native" or on_host or processes > 1:
                shard = Shard(rank=0, count=processes) if processes > 1 else None
                pack_frozen_weights(self.policy, CPU, quantization, on_host=on_host, shard=shard)

    @property
    def trainable(self) -> int:
        """Parameters of the adapter."""
        return sum(parameter.numel() for parameter in self.trained)

    def optimizer(self, *, on_host: bool) -> Optimizer:
        """One whose state is there already from the second time on."""
        if on_host not in self._optimizers:
            kind = HostAdamW if on_host else torch.optim.AdamW
            self._optimizers[on_host] = kind(self.trained)
        return self._optimizers[on_host]

    def trace_step(
        self, modes: Sequence[MemoryMode], loss: Loss, settings: TrainSettings
    ) -> dict[MemoryMode, MemoryEstimate]:
        """What each mode needs."""
        needs: dict[MemoryMode, MemoryEstimate] = {}
        with self._tensors:
            for memory in dict.fromkeys(mode.memory for mode in modes):
                apply_memory_modes(self.policy, memory)
                done: list[_Rehearsal] = []
                for name in self.anchors:
                    for mode in modes:
                        if mode.reference != name or mode.memory != memory:
                            continue
                        rehearsal = _Rehearsal(self, loss, mode, settings)
                        needs[mode] = rehearsal.like(done) or rehearsal.run()
                        done.append(rehearsal)
        return needs


class _Rehearsal:
    """One step on tensors without memory."""

    def __init__(
        self, stage: _Stage, loss: Loss, mode: MemoryMode, settings: TrainSettings
    ) -> None:
        self.model, self.policy, self.prompt = stage.model, stage.policy, stage.prompt
        self.reference_model, self.mode, self.settings = (
            stage.anchors[mode.reference],
            mode,
            settings,
        )
        self.step = Step(
            model=self.model,
            policy=self.policy,
            reference_model=self.reference_model,
            loss=loss,
            mode=mode.backward,
            # Tensor.backward takes function modes off, and what is computed again needs them.
            backward=torch.autograd.backward,
            autocast=self._autocast,
        )
        with self.reference_model.network() as reference:
            give_tensors(reference, CPU)
        self.own = nn.Module() if reference is self.policy else reference
        self.trained, self.optimizer = stage.trained, stage.optimizer
        self.done: MemoryEstimate | None = None

    @property
    def weights(self) -> int:
        """Of the policy, and of the reference where they are others; not what waits on the host."""
        packed = _allocated(self._frozen(on_host=False))
        return _bytes(self.policy) + _bytes(self.own) + packed - self.parked

    def _frozen(self, *, on_host: bool) -> list[Tensor]:
        """What is stored of packed or moved weights, on the device or on the host."""
        found = (each for each in frozen_weights(self.policy) if each.on_host == on_host)
        return [part for each in found for part in each.parts]

    @property
    def parked(self) -> int:
        """Of an expert that is not in use; its adapter stays."""
        return _allocated(
            tensor
            for experts in self.policy.modules()
            if isinstance(experts, Experts) and experts.park
            for name, tensor in experts.transformer_2.named_parameters()
            if ".lora_" not in name
        )

    @property
    def is_a_copy(self) -> bool:
        """Whether the reference is the policy, or one like it without its adapter."""
        adapter = _allocated(self.trained)
        return _bytes(self.own) in (0, _bytes(self.policy) - adapter)

    def like(self, done: Sequence[_Rehearsal]) -> MemoryEstimate | None:
        """What follows from one that was run, which spares time; None if nothing does.

        A copy computes what the policy with its adapter off does, on weights of its own. A
        reference made ahead leaves out a forward pass, whose own peak lies below that of the step.
        """
        for other in done:
            if other.done is None or not (self.is_a_copy and other.is_a_copy):
                continue
            known = other.done
            if self.reference_model.noise_draws is None:
                if known.fresh:
                    self.done = known.model_copy(
                        update={"mode": self.mode, "weights": self.weights}
                    )
            elif known.fresh:
                left_out = other.reference_alone()
                if left_out.total - self.parked < known.tensors:
                    self.done = known.model_copy(
                        update={
                            "mode": self.mode,
                            "weights": self.weights,
                            "fresh": False,
                            "flops": known.flops - left_out.flops,
                        }
                    )
            if self.done is not None:
                return self.done
        return None

    def reference_alone(self) -> Peak:
        """Of the reference's forward passes of a pair, and of nothing else."""
        batch, noise, timestep = empty_pairs(self.model, self.prompt, 1, self.dtype)
        with self._choices():
            return peak_bytes(
                lambda: _discard(self.step.reference(batch, noise, timestep)),
                networks=[self.policy, self.own],
            )

    def run(self) -> MemoryEstimate:
        """Run it."""
        on_host = "optimizer" in self.mode.offload
        optimizer = self.optimizer(on_host=on_host)
        gradients = self._gradients_before()
        count = self.settings.batch_size
        batch, noise, timestep = empty_pairs(self.model, self.prompt, count, self.dtype)
        known = None if self.reference_model.noise_draws is None else torch.cat([noise, noise])

        checks = _Believing() if self.mode.backward == "linear" else nullcontext()
        with self._choices(), checks:
            peak = peak_bytes(
                lambda: _discard(self.step(batch, noise, timestep, reference_prediction=known)),
                networks=[self.policy, self.own, gradients],
                optimizer=optimizer,
                weights=self._frozen(on_host=False),
                host=self._frozen(on_host=True),
            )
        adapter = sum(p.nbytes for p in self.trained)
        for parameter in self.trained:
            parameter.grad = None
        state = 0
        if not on_host:
            state = sum(value.nbytes for of in optimizer.state.values() for value in of.values())
        self.done = MemoryEstimate(
            mode=self.mode,
            fresh=known is None,
            weights=self.weights,
            gradients=adapter,
            optimizer=state,
            activations=max(0, peak.total - self.parked - self.weights - adapter - state),
            flops=peak.flops // self.settings.batch_size,
            host=peak.host,
        )
        return self.done

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward passes."""
        return DTYPES[self.settings.mixed_precision]

    @property
    def _mixed(self) -> bool:
        return self.dtype != torch.float32

    def _autocast(self) -> AbstractContextManager[Any]:
        """Of each forward pass, as in training."""
        return torch.autocast("cpu", self.dtype, enabled=self._mixed)

    def _choices(self) -> AbstractContextManager[None]:
        return choosing_as_cuda() if self._mixed else nullcontext()

    def _gradients_before(self) -> nn.Module:
        """Gradients of the batches before this one in an optimizer step, if there are any."""
        holder = nn.Module()
        if self.settings.gradient_accumulation_steps > 1:
            for index, parameter in enumerate(self.trained):
                parameter.grad = torch.zeros_like(parameter)
                holder.register_buffer(str(index), parameter.grad)
        return holder


def empty_pairs(
    model: VideoModel, prompt: Mapping[str, tuple[int, ...]], count: int, dtype: torch.dtype
) -> tuple[PairBatch, Tensor, Tensor]:
    """Pairs, their noise and their levels, as the store and the loop would give them.

    Args:
        model: Whose latents they are; they lie on its device.
        prompt: Shapes of an encoded one.
        count: How many.
        dtype: Of the encoded prompts.
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


class _Believing(TorchFunctionMode):
    """Lets checks of values pass, where there are none."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return True if func is torch.equal else func(*args, **(kwargs or {}))


def give_tensors(network: nn.Module, device: torch.device) -> None:
    """Put empty tensors on a device in the place of an outline's.

    Under `FakeTensorMode` they have a device and no memory.
    """
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _bytes(network: nn.Module) -> int:
    return _allocated((*network.parameters(), *network.buffers()))


def _allocated(tensors: Iterable[Tensor]) -> int:
    """Bytes, in the allocator's blocks."""
    return sum(BLOCK * math.ceil(tensor.nbytes / BLOCK) for tensor in tensors)


def _discard(result: object) -> None:
    """What a run must not give back."""
