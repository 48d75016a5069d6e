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
    Preference,
    Region,
    SegmentLabel,
    Video,
    Videos,
    VideoShape,
)


class Strategy(BaseModel):
    """Base of all kinds: frozen options, no unknown ones."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
    kind: ClassVar[str]
    secrets: ClassVar[Mapping[str, str]] = {}
    """Options that name a secret, such as an environment variable with a key, each with the option
    that names where it is sent. Only the command line and Python set them, never a file, and no
    run.toml holds them. If a file names where it is sent, the secret is "" unless it is set too."""


# --- what strategies create for a run ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Default sampling settings of a family, used where an option is not set."""

    num_inference_steps: int
    guidance_scale: float


PACKED = "+"  # separates the hash of the weights from their quantization in an identity


def weights_of(identity: str) -> str:
    """The part of an identity that names the weights, without their quantization."""
    return identity.partition(PACKED)[0]


class VideoModel(ABC):
    """A loaded video diffusion model; the only class that knows its family.

    The denoiser is loaded from the start. The VAE and the text encoder are loaded on first use and
    can be freed.
    """

    denoiser: nn.Module
    shape: VideoShape
    sampling: Sampling
    device: torch.device
    identity: str
    """Hash of the weights, recorded in pairs and checkpoints. Quantized weights append their type:
    `hash+nf4`."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """`(c, f, h, w)` of one video."""

    @abstractmethod
    def encode_videos(self, videos: Videos) -> Latents:
        """Encode pixels in [0, 1] to scaled latents, the mean of the VAE's posterior."""

    @abstractmethod
    def decode_videos(self, latents: Latents) -> Videos:
        """Decode scaled latents to pixels in [0, 1]."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Context:
        """Encode prompts to the denoiser's conditioning."""

    def negative_context(self, prompt: str | None = None) -> Context | None:
        """Encode a negative prompt (None: the backbone's) now, and keep it for `sample`.

        So `sample` needs no text encoder. Returns it with a leading axis of 1, on the CPU; None, as
        by default, if the model encodes it only when it is needed.
        """
        return None

    def keep_negative(self, context: Context) -> None:  # noqa: B027 # optional
        """Keep what `negative_context` once returned for the backbone's own negative prompt."""

    def unread(self, prompt: str) -> str:
        """The end of a prompt that the text encoder cuts off; empty, as by default, if none is."""
        return ""

    @abstractmethod
    def sample_timesteps(self, n: int, generator: Generator) -> PerPair:
        """Draw `n` training timesteps from the family's distribution, on the CPU."""

    @abstractmethod
    def add_noise(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """Forward process at `timestep`, one timestep per video."""

    @abstractmethod
    def target(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """Training target of the denoiser: epsilon, v or flow velocity."""

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: Latents, timestep: PerPair, context: Context
    ) -> Latents:
        """Prediction of a denoiser of this family, with or without an adapter."""

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
        negative_prompt: str | None = None,
        dynamic_guidance: bool | None = None,
    ) -> Latents:
        """Sample latents of videos, deterministically given `noise`.

        Without `clean` it samples text-to-video. With `clean`, sampling starts from `clean` noised
        to `strength`, a share in (0, 1] of the schedule (as in img2img). With `region` as well,
        only the region is regenerated, and everything outside equals `clean` to the bit.
        `per_frame` samples every frame on its own: by the image model that the video model extends
        (AnimateDiff) or, in a family without one, every latent frame as the smallest video.

        An option that is None is the backbone's. A backbone outside this package need not take
        `negative_prompt` and `dynamic_guidance`: they are passed where an option sets them.
        """

    def strength_at(self, sigma: float, num_inference_steps: int | None = None) -> float:
        """The largest `strength` of `sample` that starts from no more noise than `sigma`.

        `sigma` is a share: signal to noise is `(1 - sigma) : sigma`, as in flow matching. `sigma`
        itself is right for flow matching with evenly spaced timesteps; other schedules override it.
        """
        return sigma

    @abstractmethod
    def latent_frames(self, segment: slice) -> slice:
        """Latent frames covered by a slice of pixel frames."""

    @abstractmethod
    def lora_targets(self) -> list[str]:
        """Names of the modules of `denoiser` that get a LoRA."""

    def prompt_shapes(self) -> Mapping[str, tuple[int, ...]] | None:
        """Shapes of one encoded prompt by name, without encoding one; None if unknown."""
        return None

    @abstractmethod
    def release(self) -> None:
        """Free the VAE and the text encoder, so that only the denoiser stays in memory.

        They are loaded again on their next use. An encoded empty prompt for classifier-free
        guidance is kept.
        """

    def export_spec(self) -> ExportSpec | None:
        """Names of its parts in diffusers and ComfyUI; None if neither runs the model."""
        return None


class ReferenceModel(ABC):
    """The frozen model that a policy is compared with during a run."""

    noise_draws: int | None = None
    """Number of (noise, timestep) draws per pair. A pair then cycles through them, and their
    reference predictions are cached (training/reference_cache.py). None for a new draw at every
    visit."""

    @abstractmethod
    def network(self) -> AbstractContextManager[nn.Module]:
        """The reference network, valid inside the `with` block only."""

    def after_step(self) -> None:  # noqa: B027 # optional
        """Called after every optimizer step that changed the policy, in every process."""

    def state(self) -> Mapping[str, Tensor]:
        """What changes during a run, saved in its checkpoints; empty by default."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 # optional
        """Take over a state from a checkpoint, with tensors on the CPU."""


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
    """Options of the metrics by name: `--set labeler.options.warp_error.flow=videodpo_lk`."""

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

    def remark(self, text: str) -> None:  # noqa: B027 # optional
        """Tell the user something about the labels; ignored by default."""


class StoreLabeler(AnyLabeler, ABC):
    """Labels a stored set by itself: interactively, or from a file of labels."""

    @abstractmethod
    def label_store(self, task: LabelTask) -> None:
        """Record labels until all pairs have one, the rater stops or Ctrl-C is pressed."""


class PairBuilder(Strategy, ABC):
    """Builds a preference pair from a clip or a prompt."""

    kind: ClassVar[str] = "pairs"
    asks_labeler: ClassVar[bool] = True
    """False if the construction of a pair determines which video is better."""
    needs_labeler: ClassVar[bool] = False
    """True if a pair cannot be built without a labeler."""
    pairs_version: ClassVar[int] = 1
    """Increased when the same options make other pairs, so that pairs of an earlier version are not
    taken for them."""

    @property
    def needs_video(self) -> bool:
        """Whether clips need a video, as by default; otherwise a prompt is enough."""
        return True

    @abstractmethod
    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Build one pair; all randomness comes from `generator`."""


class SuppliedPairs(PairBuilder, ABC):
    """A pair builder with its own source of clips, such as finished pairs on disk."""

    @abstractmethod
    def source(self, model: VideoModel, prompt: str | None) -> PairSource:
        """Open it; `prompt` is for whatever has none of its own.

        The pairs are then made of its clips and of no others. A UserError if there is nothing to
        make a pair of, here or when the first clip is asked for.
        """


class Loss(Strategy, ABC):
    """A pure function of the errors: one value per pair, without a mean over the batch."""

    kind: ClassVar[str] = "loss"
    needs_region: ClassVar[bool] = False
    """Whether it needs pairs whose videos are equal outside a region."""
    compares: ClassVar[bool] = True
    """Whether it compares the two videos of a pair. False for supervised fine-tuning, which sees
    the chosen video only: the rejected video is not predicted then."""
    needs_reference: ClassVar[bool] = True
    """Whether it sees the reference's errors. If False, no reference is made or run."""
    reference_free: ClassVar[bool] = True
    """Whether it can compare the policy's own errors, with the reference `none`."""
    sees_groups: ClassVar[bool] = False
    """Whether it sees the samples that are ranked between the two videos of a pair
    (`PairErrors.between`). They are not predicted otherwise."""
    linear_in_mean_error: ClassVar[bool] = False
    """Whether the loss depends on a video's errors by their mean only, so its gradient is the
    same for all of them. Such a loss can be trained with `memory.backward = linear`, which takes
    one forward pass less than `split`. Factors that differ between pairs, such as one that depends
    on the timestep, are no obstacle; those that differ between frames or elements are."""

    def pair_weights(self, preference: Preference) -> PerPair:
        """Weights of the pairs in the mean loss of an optimizer step; equal by default.

        Only their ratios count: times the pairs' own weights (`Pair.weight`), they are divided by
        their mean over all pairs of the step, on all processes.
        """
        return torch.ones(len(preference))

    @abstractmethod
    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""


class Reference(Strategy, ABC):
    """The way the frozen model's predictions are obtained."""

    kind: ClassVar[str] = "reference"
    exact: ClassVar[bool] = True
    """Whether it predicts the same as the policy at the first step, to the bit, which is checked
    there. False for a reference that is meant to differ, such as another checkpoint."""

    @abstractmethod
    def attach(self, policy: nn.Module) -> ReferenceModel | None:
        """Reference model of a policy, a peft model that trains its adapter only.

        None for no reference: its errors are then taken as 0.
        """


class Metric(Strategy, ABC):
    """Measures a video with one number."""

    kind: ClassVar[str] = "metric"
    higher_is_better: ClassVar[bool]
    unit: ClassVar[str]
    role: ClassVar[Literal["target", "motion", "guard"]] = "target"
    """target: what training should improve; motion: the amount of motion; guard: what must not get
    worse."""

    @abstractmethod
    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One number per video."""

    def witness(self) -> tuple[str, Metric] | None:
        """Name of a second method and the same metric by it, in the same unit; None without one.

        An evaluation measures it as well, and says where the two disagree.
        """
        return None


class Backbone(Strategy, ABC):
    """A family of video diffusion models."""

    kind: ClassVar[str] = "backbone"
    guards: ClassVar[tuple[str, ...]]
    """Names of the guard metrics of its evaluations."""
    training: ClassVar[Mapping[str, Any]] = {}
    """Defaults of [train] for this family, from its papers."""
    tiers: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Presets for cards: name of a tier to options by path, such as {"l4": {"train.rank": 16}}.
    They go before what the tier has for every backbone."""
    efficiency: ClassVar[float] = 0.35
    """Share of a card's published operations per second that a training step is assumed to reach;
    measured for AnimateDiff and Wan (benchmarks/results/0.1.0/gpu.md)."""

    @abstractmethod
    def load(self, placement: Placement) -> VideoModel:
        """Load the model, frozen and in evaluation mode.

        `dpo_video.diffusion.pretrained` follows all of a placement; a backbone that loads in its
        own way needs `device` and `dtype` only.
        """

    @abstractmethod
    def clips(self, seed: int) -> Iterator[Clip] | None:
        """Endless iterator of the family's own clips; None if it has none."""

    @abstractmethod
    def prompts(self, n: int) -> list[str]:
        """`n` diverse evaluation prompts."""
