"""Further kinds of strategy: how a run takes its steps, who is told of them, and more.

As in `dpo_video.strategies`, everything here is abstract: what runs is in the folder named after
the kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partialmethod
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Generator, Tensor, nn

from dpo_video.settings import TrainSettings
from dpo_video.strategies import Strategy, VideoModel
from dpo_video.support.report import StepEvent
from dpo_video.support.statistics import Array, Record
from dpo_video.types import ExportSpec, LoraDelta, LoraUpdate, PairBatch, PerPair


class TimestepSampler(Strategy, ABC):
    """Draws the timesteps that a run trains at.

    It has no state: what it draws depends on the generator alone, which is made from the run's
    seed, the pair and the number of its draw. So a resumed run draws the same.
    """

    kind: ClassVar[str] = "timesteps"

    @abstractmethod
    def __call__(self, model: VideoModel, n: int, generator: Generator) -> PerPair:
        """Draw `n` timesteps in the family's unit, fp32 on the CPU.

        `model.sample_timesteps` draws from the family's own distribution, and
        `model.add_noise` tells how much noise there is at a timestep.
        """


class Optimizer(Strategy, ABC):
    """Makes the optimizer of the adapter's weights."""

    kind: ClassVar[str] = "optimizer"
    offloads: ClassVar[bool] = False
    """Whether it can keep its state in CPU memory, as memory.offload=optimizer asks."""

    @abstractmethod
    def __call__(
        self, parameters: list[nn.Parameter], settings: TrainSettings, *, on_host: bool = False
    ) -> torch.optim.Optimizer:
        """An optimizer of all `parameters`.

        Its learning rate is set before every step. What its `state_dict` returns is saved in
        checkpoints: tensors, numbers, texts, and lists and dicts of them.

        Args:
            parameters: The adapter's weights.
            settings: Table [train], such as its weight decay.
            on_host: Keep the state in CPU memory; only asked of one that `offloads`.
        """


class Schedule(Strategy, ABC):
    """The learning rate over the steps of a run.

    It has no state: a factor depends on the step and the settings alone, so that a resumed run has
    the same.
    """

    kind: ClassVar[str] = "schedule"

    @abstractmethod
    def __call__(self, step: int, settings: TrainSettings) -> float:
        """Factor of `train.learning_rate` at a step, 0 or more.

        Args:
            step: Number of the step, from 0 to `settings.steps - 1`.
            settings: Table [train], such as its number of steps.
        """


class TrainingRun(ABC):
    """What a listener may use of a run."""

    model: VideoModel
    """The model, whose denoiser has the adapter."""
    policy: nn.Module
    """The denoiser with its adapter, a peft model."""
    settings: TrainSettings
    """Table [train]."""
    options: Mapping[str, Any]
    """All of the run's options by path."""
    out: Path
    """The run's folder."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Number of optimizer steps done."""

    @property
    @abstractmethod
    def is_main(self) -> bool:
        """Whether this is the process that writes files, one of several."""

    @abstractmethod
    def end(self, reason: str) -> None:
        """End the training after this step, with a checkpoint.

        Call it in every process alike. `reason` is a sentence for the user.
        """


class Listener:
    """Receives what happens in a training. Override the methods you need.

        class Print(Listener):
            def on_step_end(self, event: StepEvent) -> None:
                print(event.report.step, event.report.loss)

    They are called in every process. An exception ends the training.
    """

    kind: ClassVar[str] = "listener"
    run: TrainingRun

    def on_train_begin(self, run: TrainingRun) -> None:
        """Called before the first step, and before the first step after resuming."""
        self.run = run

    def on_step_end(self, event: StepEvent) -> None:
        """Called after every optimizer step, before the checkpoint that `event` names."""

    def on_checkpoint(self, folder: Path) -> None:
        """Called after a checkpoint was written to `folder`."""

    def on_train_end(self) -> None:
        """Called after the last step and its checkpoint, or when the run was stopped."""

    def state(self) -> Mapping[str, Tensor]:
        """What a resumed run needs of it, saved in checkpoints; empty by default."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state from a checkpoint, with tensors on the CPU, before the first step."""


class ListenerFactory(Strategy, ABC):
    """Makes a listener for a training, which is chosen by `--listener NAME`."""

    kind: ClassVar[str] = "listener"

    @abstractmethod
    def __call__(self) -> Listener:
        """A new listener for one training."""


class Level(StrEnum):
    """Severity of a finding."""

    FINE = "fine"
    UNKNOWN = "unknown"
    """It could not be checked."""
    NOTICE = "notice"
    """Harmless or not, depending on the aim of the training."""
    PROBLEM = "problem"
    """Correct it before training."""


class Finding(Record):
    """The result of one check."""

    check: str
    level: Level
    message: str
    advice: str = ""
    """What to do; empty if all is fine."""
    pairs: tuple[int, ...] = ()
    """Indices of the pairs concerned, if single ones are."""
    figures: dict[str, float] = Field(default_factory=dict)


class Findings:
    """Makes the findings of one check: `Findings("length").notice("One is long.", "Cut it.")`."""

    def __init__(self, name: str, **figures: float) -> None:
        self.name, self.figures = name, figures

    def __call__(
        self, level: Level, message: str, advice: str = "", pairs: Sequence[int] = ()
    ) -> Finding:
        """A finding; `figures` are its numbers by name."""
        return Finding(check=self.name, level=level, message=message, advice=advice,
                       pairs=tuple(pairs), figures=self.figures)  # fmt: skip

    fine = partialmethod(__call__, Level.FINE)
    unknown = partialmethod(__call__, Level.UNKNOWN)
    notice = partialmethod(__call__, Level.NOTICE)
    problem = partialmethod(__call__, Level.PROBLEM)


@dataclass(frozen=True, kw_only=True)
class PairSummary:
    """The numbers of a pair that the checks use."""

    index: int
    finite: bool
    label: int
    """+1 if most frames prefer the first video, -1 the second, 0 for as many of each."""
    decided: float
    """Share of frames that are not ties."""
    distance: float
    """RMS difference inside the region, in standard deviations of the first video."""
    outside: float
    """Largest absolute difference outside the region."""
    scale: float
    hashes: tuple[str, str]
    signature: Float[Tensor, " k"]
    statistics: tuple[Array, Array]


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """What a check sees of stored pairs."""

    where: str
    """Folder or URL."""
    model: VideoModel
    """The model to train on them."""
    match: Finding
    """Whether they were made for this model."""
    summaries: Sequence[PairSummary]
    """Of every pair."""
    prompts: Sequence[str]
    """Of every pair."""
    evaluation_prompts: Sequence[str]
    """The evaluation's prompts."""
    motion: Mapping[str, Sequence[tuple[float, float]]]
    """Metrics of motion to (chosen, rejected) of the pairs that were decoded."""
    batch: Callable[[int], PairBatch]
    """Reads a pair by its index, as a batch of one."""

    @property
    def finite(self) -> list[PairSummary]:
        """The summaries of pairs without nan and infinity."""
        return [pair for pair in self.summaries if pair.finite]


class PairCheck(Strategy, ABC):
    """Checks a pair set before it is trained on."""

    kind: ClassVar[str] = "check"

    @abstractmethod
    def __call__(self, pair_set: PairSet) -> Finding | Sequence[Finding]:
        """One finding or several."""


@dataclass(frozen=True, kw_only=True)
class ExportedAdapter:
    """An adapter to be written for other programs."""

    name: str
    """Name of the run, for files that are listed by name."""
    spec: ExportSpec
    """Names of the model's parts in other programs, and its networks."""
    updates: Mapping[str, LoraDelta]
    """Network of `spec` to the updates of its adapted modules, on the CPU."""
    dtype: torch.dtype | None
    """Precision of the stored weights; None keeps their own."""
    config: Any
    """The adapter's peft.LoraConfig."""

    def stored(self, update: LoraUpdate) -> tuple[Tensor, Tensor]:
        """Both factors, down and up, in `dtype`, with alpha / rank multiplied into `up`."""
        return (
            update.down.to(self.dtype or update.down.dtype),
            update.folded.to(self.dtype or update.up.dtype),
        )


class ExportFormat(Strategy, ABC):
    """What every format of exports shares. A format of adapters derives from `AdapterFormat`."""

    kind: ClassVar[str] = "format"
    library: ClassVar[str] = "diffusers"
    """The library that the model card names."""

    @abstractmethod
    def usage(self, spec: ExportSpec) -> str:
        """How to load it, a sentence of the model card; with a colon at the end before a script."""


class AdapterFormat(ExportFormat, ABC):
    """A file format of adapters.

    What is written is loaded back and compared with the run before the export's folder gets its
    name.
    """

    imports: ClassVar[tuple[str, ...]] = ()
    """Lines of Python that `script` needs."""

    @abstractmethod
    def write(self, folder: Path, adapter: ExportedAdapter) -> None:
        """Write the updates of every adapted network."""

    @abstractmethod
    def load(self, folder: Path, adapter: ExportedAdapter, network: str) -> None:
        """Load the written adapter of a network into `adapter.spec.networks[network]`.

        As the other program does: the comparison is only worth what this repeats.
        """

    def unload(self, network: Any) -> None:
        """Remove the adapter that `load` put on a network; by default as diffusers does."""
        network.unload_lora()

    def script(self, folder: Path, spec: ExportSpec, network: str) -> str:
        """A line of Python that loads a network's adapter into `pipe`; "" if Python does not."""
        return ""

    @final
    @contextmanager
    def loaded(self, folder: Path, adapter: ExportedAdapter) -> Iterator[None]:
        """Context in which the networks have the written adapter."""
        loaded = []
        try:
            for network in adapter.updates:
                self.load(folder, adapter, network)
                loaded.append(network)
            yield
        finally:
            for network in loaded:
                self.unload(adapter.spec.networks[network])


class MergedFormat(ExportFormat, ABC):
    """A complete checkpoint in diffusers' layout, in whose weights the adapter is merged."""
