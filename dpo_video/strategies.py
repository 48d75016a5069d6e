"""The kinds of strategy, and what some of them make for a run.

A strategy is a frozen pydantic model: its fields are its options, their docstrings the help, its
class docstring names its source. It holds no state; what changes during a run lives in the objects
that it makes. Everything here is abstract: what runs is in the folder named after the kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Generator, Tensor, nn

from dpo_video.types import (
    Clip,
    Context,
    ExportSpec,
    Latents,
    LossOutput,
    Pair,
    PairErrors,
    PairSource,
    PerPair,
    Placement,
    Region,
    SegmentLabel,
    Video,
    Videos,
    VideoShape,
)


class Strategy(BaseModel):
    """What all kinds share: frozen options, no others accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    kind: ClassVar[str]


# --- what strategies make for a run ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A family's own sampling settings, used wherever an option leaves them open."""

    num_inference_steps: int
    guidance_scale: float


PACKED = "+"  # in an identity, between the hash of the weights and what they were packed into


def weights_of(identity: str) -> str:
    """The part of an identity that stands for the weights alone, packed or not."""
    return identity.partition(PACKED)[0]


class VideoModel(ABC):
    """A loaded video diffusion model; the only class that knows its family.

    The denoiser is there from the start. What encodes and decodes is loaded when it is first used,
    and can be freed.
    """

    denoiser: nn.Module
    shape: VideoShape
    sampling: Sampling
    device: torch.device
    identity: str
    """A hash of the weights: what pairs and checkpoints were made with. Where they were packed into
    fewer bits since, that follows: `hash+nf4`."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """`(c, f, h, w)` of one video."""

    @abstractmethod
    def encode_videos(self, videos: Videos) -> Latents:
        """Pixels in [0, 1] to scaled latents, by the mean of the posterior."""

    @abstractmethod
    def decode_videos(self, latents: Latents) -> Videos:
        """Scaled latents to pixels in [0, 1]."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Context:
        """What the denoiser needs to know of the prompts."""

    @abstractmethod
    def sample_timesteps(self, n: int, generator: Generator) -> PerPair:
        """Draw `n` training noise levels from the family's distribution, on the CPU."""

    @abstractmethod
    def add_noise(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """The forward process at `level`, one level per video."""

    @abstractmethod
    def target(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """What the denoiser is trained to predict: epsilon, v or flow velocity."""

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: Latents, timestep: PerPair, context: Context
    ) -> Latents:
        """Run a denoiser of this family (the model's own, adapted or not)."""

    @abstractmethod
    def sample(
        self,
        context: Context,
        noise: Latents,
        *,
        denoiser: nn.Module | None = None,
        clean: Latents | None = None,
        strength: float = 1.0,
        region: Region | None = None,
        per_frame: bool = False,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Latents:
        """Draw videos' latents, deterministically given `noise`.

        Pure noise gives text-to-video. With `clean`, sampling starts from `clean` noised to
        `level`, a share in (0, 1] of the schedule (guided re-noising). With `region` as well, only
        the region is repainted and everything outside equals `clean` to the bit. `per_frame` treats
        every frame as a video of its own.
        """

    def strength_at(self, sigma: float, num_inference_steps: int | None = None) -> float:
        """The share of the schedule, as `sample` takes it, whose noise is at most `noise_level`.

        That is itself where steps are spread evenly over the noise levels, t / T in (0, 1]; not on
        a shifted schedule.
        """
        return sigma

    @abstractmethod
    def latent_frames(self, segment: slice) -> slice:
        """The latent frames that a slice of pixel frames covers."""

    @abstractmethod
    def lora_targets(self) -> list[str]:
        """Names of the modules of `denoiser` that an adapter goes on."""

    def prompt_shapes(self) -> Mapping[str, tuple[int, ...]] | None:
        """Shapes of one encoded prompt by name, told without encoding any; None if it cannot."""
        return None

    @abstractmethod
    def release(self) -> None:
        """Free what only encodes and decodes: the denoiser's weights are all that stays.

        It is loaded again when it is next used. The encoded empty prompt, which sampling is guided
        away from, is kept if it was there.
        """

    def publication(self) -> ExportSpec | None:
        """How other programs call its parts; None where none runs such models."""
        return None


class ReferenceModel(ABC):
    """The frozen model that a policy is compared with, for the length of a run."""

    noise_draws: int | None = None
    """How many noises and levels a pair has; its visits then take them in turn, and the loop keeps
    the predictions for them (dpo_video/training/reference_cache.py). None for a fresh draw at every
    visit."""

    @abstractmethod
    def network(self) -> AbstractContextManager[nn.Module]:
        """The reference network, for use inside the `with` block only."""


# --- the kinds -------------------------------------------------------------------------------


class AnyLabeler(Strategy, ABC):
    """What every strategy of the kind `labeler` shares.

    A labeler derives from one of `Labeler`, `LabelerFactory` and `StoreLabeler`.
    """

    kind: ClassVar[str] = "labeler"
    incidental: ClassVar[frozenset[str]] = frozenset()
    """Options that do not change the labels (a port, a price): labelling resumes under the same
    name when they change."""


class Labeler(AnyLabeler, ABC):
    """Judges which of two videos is better, per segment."""

    @abstractmethod
    def __call__(
        self, prompts: Sequence[str], first: Videos, second: Videos, segments: Sequence[slice]
    ) -> Float[Tensor, "b s"]:
        """+1 where the first video is better, -1 the second, 0 for a tie; a column per segment."""


@dataclass(frozen=True, kw_only=True)
class LabelResult:
    """Labels, their reasons and their cost."""

    labels: Float[Tensor, "b s"]
    notes: Sequence[str]
    """The reason, one per pair."""
    figures: Mapping[str, float]
    """Costs by name, summed over calls: requests, tokens, US dollars."""


class ReasonedLabeler(Labeler, ABC):
    """A labeler that gives reasons and reports its costs."""

    @abstractmethod
    def judge(
        self, prompts: Sequence[str], first: Videos, second: Videos, segments: Sequence[slice]
    ) -> LabelResult:
        """Labels with reasons and costs."""

    @final
    def __call__(
        self, prompts: Sequence[str], first: Videos, second: Videos, segments: Sequence[slice]
    ) -> Float[Tensor, "b s"]:
        """The labels of `judge` alone."""
        return self.judge(prompts, first, second, segments).labels


class LabelerFactory(AnyLabeler, ABC):
    """Makes a labeler out of metrics that it names.

    A kind does not import another, so the workflow that reads the configuration loads the metrics
    and passes them to `with_metrics`.
    """

    options: dict[str, dict[str, Any]] = {}
    """Options of the metrics by name: `--set labeler.options.warp_error.variant=videodpo_lk`."""

    @property
    @abstractmethod
    def metric_names(self) -> Sequence[str]:
        """Names of the metrics to pass to `with_metrics`."""

    @abstractmethod
    def with_metrics(self, metrics: Mapping[str, Metric]) -> Labeler:
        """The labeler that judges by these metrics, one for each of `metric_names`."""


class LabelTask(ABC):
    """A stored set of pairs to label, and the labels recorded so far."""

    pairs: Sequence[int]
    """Indices of all pairs, labelled or not."""
    segments: Sequence[slice]
    """In pixel frames."""
    fps: float

    @abstractmethod
    def prompt(self, pair: int) -> str:
        """The prompt of a pair."""

    @abstractmethod
    def videos(self, pair: int) -> tuple[Video, Video]:
        """The first and the second video, decoded on demand, on the CPU."""

    @property
    @abstractmethod
    def raters(self) -> Sequence[str]:
        """Everyone who recorded a label, in order of appearance."""

    @abstractmethod
    def labels_by(self, rater: str = "") -> Mapping[int, Sequence[SegmentLabel]]:
        """A rater's labels so far by pair, one per segment; None where a segment has none yet."""

    @abstractmethod
    def record(
        self, pair: int, labels: Sequence[SegmentLabel], *, rater: str = "", note: str = ""
    ) -> None:
        """Write a rater's labels of a pair to the disk before returning.

        They replace that rater's earlier labels of the pair, for relabelling and undoing.
        """


class StoreLabeler(AnyLabeler, ABC):
    """Labels a stored set by itself: interactively, or from a file of labels."""

    @abstractmethod
    def label_store(self, task: LabelTask) -> None:
        """Record labels until all pairs have one, the rater stops or Ctrl-C is pressed."""


class PairBuilder(Strategy, ABC):
    """Makes a preference pair of a clip or of a prompt."""

    kind: ClassVar[str] = "pairs"
    asks_labeler: ClassVar[bool] = True
    """False where the way a pair is made says who is better."""
    needs_labeler: ClassVar[bool] = False
    """True where a pair cannot be made without one."""

    @property
    @abstractmethod
    def needs_video(self) -> bool:
        """Whether the clips must have a video; otherwise a prompt is enough."""

    @abstractmethod
    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Make one pair; all randomness comes from `generator`."""


class SuppliedPairs(PairBuilder, ABC):
    """A pair builder that brings what its pairs are made of, such as somebody's finished pairs."""

    @abstractmethod
    def material(self, model: VideoModel, prompt: str | None) -> PairSource:
        """Open it; `prompt` is for whatever has none of its own.

        The pairs are then made of its clips and of no others. A UserError if there is nothing to
        make a pair of, here or when the first clip is asked for.
        """


class Loss(Strategy, ABC):
    """A pure function of the errors: one value per pair, never a mean over the batch."""

    kind: ClassVar[str] = "loss"
    needs_region: ClassVar[bool] = False
    """Whether it makes sense only for pairs whose videos are equal outside a region."""
    linear_in_mean_error: ClassVar[bool] = False
    """Whether its gradient on a video's errors is one number for all of them, as it is where they
    enter by their mean alone. Such a loss can be trained with `memory.backward = linear`."""

    @abstractmethod
    def __call__(self, errors: PairErrors) -> LossOutput:
        """The loss of every pair."""


class Reference(Strategy, ABC):
    """Where the frozen model's predictions come from."""

    kind: ClassVar[str] = "reference"

    @abstractmethod
    def attach(self, policy: nn.Module) -> ReferenceModel:
        """The anchor of a policy: a peft model whose only trainable part is its adapter."""


class Metric(Strategy, ABC):
    """A video to one number."""

    kind: ClassVar[str] = "metric"
    higher_is_better: ClassVar[bool]
    unit: ClassVar[str]
    role: ClassVar[Literal["target", "motion", "guard"]] = "target"
    """What to improve, how much moves, or what must not be lost on the way."""

    @abstractmethod
    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One number a video."""


class Backbone(Strategy, ABC):
    """A family of video diffusion models."""

    kind: ClassVar[str] = "backbone"
    guards: ClassVar[tuple[str, ...]]
    """Names of the metrics that must not get worse when another one improves."""
    training: ClassVar[Mapping[str, Any]] = {}
    """Options of [train] as the family's papers have them, where nobody sets others."""

    @abstractmethod
    def load(self, placement: Placement) -> VideoModel:
        """Load the model, frozen and in evaluation mode.

        `dpo_video.diffusion.pretrained` follows all of a placement; a backbone that loads in its
        own way needs `device` and `dtype` only.
        """

    @abstractmethod
    def clips(self, seed: int) -> Iterator[Clip] | None:
        """The family's own endless supply of real clips; None if it has none."""

    @abstractmethod
    def prompts(self, n: int) -> list[str]:
        """`n` prompts spread over what the family can show, for evaluation."""
