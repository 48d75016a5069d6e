"""Data types that the parts exchange: frozen dataclasses with shaped tensors.

Axes: `b` pair, `c` latent channel, `f` latent frame, `h w` latent height and width; capitals
`F H W` are the same in pixels. Pixels lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Video = Float[Tensor, "3 F H W"]
Videos = Float[Tensor, "b 3 F H W"]
Latents = Float[Tensor, "b c f h w"]
Region = Float[Tensor, "b 1 f h w"]
Preference = Float[Tensor, "b f"]
PerPair = Float[Tensor, " b"]
# A rater's label of one segment in [-1, 1], "skip", or None if it has no label yet.
SegmentLabel = float | Literal["skip"] | None
# Encoded prompts for the denoiser: named tensors whose first axis is `b`.
Context = Mapping[str, Tensor]

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class VideoShape:
    """Size and frame rate of the videos that a backbone takes and returns, in pixels."""

    frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class Placement:
    """Device and precision of a loaded model, and how its frozen denoiser is packed."""

    device: torch.device = _CPU
    dtype: torch.dtype = torch.float32
    """Precision of the weights."""
    _: KW_ONLY
    pack: Callable[[nn.Module], object] | None = None
    """Called with the frozen denoiser before it is moved to `device`: quantizes or offloads its
    weights in place, so that a denoiser that does not fit on the device is never there whole.
    Optional for a backbone: whoever loads the model packs a denoiser that is not packed yet."""
    denoiser_on_host: bool = False
    """Leave the denoiser in CPU memory, from where training shards its weights over processes.
    Optional for a backbone: if it is on `device`, that needs more memory for a moment."""
    pack_text_encoder: Callable[[nn.Module], object] | None = None
    """The same for the text encoder."""
    on_meta: bool = False
    """Build networks from their configurations on the meta device, without weights, to estimate
    memory. `device` is then the device that the model would run on."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A captioned video at the backbone's shape, or a prompt alone (`video` is None)."""

    name: str
    """Path of its file, or name of its generator."""
    caption: str
    video: Video | None = None
    negative_prompt: str | None = None
    """What its samples are guided away from; None for the backbone's."""
    seed: int | None = None
    """Seed of its pair; None for the one that the run's seed and the pair's index give."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of a list."""

    text: str
    seed: int | None = None
    """Seed of the initial noise; None leaves it to the user of the list."""
    negative_prompt: str | None = None
    """What sampling is guided away from; None for the backbone's."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A skipped file and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Remark:
    """Something to know about a file that is used."""

    what: str
    """The same for all files of which it is true, such as "HDR (HLG), converted to SDR"."""
    name: str
    """The file."""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Clips of a pair builder that has its own source."""

    clips: Iterator[Clip]
    """One clip per pair, always in the same order."""
    count: int
    """Upper bound of their number; damaged clips are found only when they are read."""
    fingerprint: str
    """Hash of the clips."""
    skipped: Sequence[Skipped]
    """Skipped files; grows while `clips` is iterated."""
    remarks: Sequence[Remark] = ()
    """On files that are used; grows while `clips` is iterated."""
    contents: str = ""
    """The files by type, such as "2 mp4, 1 webp"."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Latents of two videos of one prompt, and which is preferred in which frames."""

    first: Float[Tensor, "c f h w"]
    second: Float[Tensor, "c f h w"]
    preference: Float[Tensor, " f"]
    """In [-1, 1] per latent frame: +1 where the first is better, -1 the second, 0 a tie."""
    region: Float[Tensor, "1 f h w"]
    """1 where the two may differ, 0 where they are equal by construction."""
    prompt: str
    source: str
    """Name of the clip that it was built from."""
    strength: float = 0.0
    """Share of the noise schedule, in (0, 1], that the rejected video was regenerated from
    (LocalDPO's alpha, DenseDPO's eta); 0 if it was not re-noised."""
    weight: float = 1.0
    """Weight of the pair in the loss of its optimizer step, above 0: a fraction of votes, a gap of
    scores, an amount of motion. Only ratios count."""
    context: Context | None = None
    """The encoded prompt with a leading axis of 1, if it came with the pair; None if the model has
    to encode `prompt`."""
    between: Float[Tensor, "n c f h w"] | None = None
    """Latents of further samples of the prompt, ranked between the chosen and the rejected video,
    best first. Losses that see groups, such as `group`, compare them as well."""
    ranks: Sequence[int] = ()
    """With `between`: the ranks of the chosen video, of `between` and of the rejected video. 0 is
    the best, and equal ranks are ties."""


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Pairs stacked along `b`, with their prompts encoded."""

    first: Latents
    second: Latents
    preference: Preference
    region: Region
    strength: PerPair
    context: Context
    keys: Sequence[str]
    between: Float[Tensor, "b n c f h w"] | None = None
    """See `Pair`."""
    ranks: Float[Tensor, "b m"] | None = None

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on another device."""
        return self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        """The batch with every tensor changed."""
        return PairBatch(
            first=change(self.first),
            second=change(self.second),
            preference=change(self.preference),
            region=change(self.region),
            strength=change(self.strength),
            context={name: change(value) for name, value in self.context.items()},
            keys=self.keys,
            between=None if self.between is None else change(self.between),
            ranks=None if self.ranks is None else change(self.ranks),
        )

    def as_pairs(self) -> PairBatch:
        """The batch without the samples between the two of each pair."""
        return replace(self, between=None, ranks=None)


@dataclass(frozen=True, kw_only=True)
class GroupErrors:
    """Squared errors on the samples that are ranked between the two videos of a pair."""

    policy: Float[Tensor, "b n c f h w"]
    reference: Float[Tensor, "b n c f h w"]
    ranks: Float[Tensor, "b m"]
    """Ranks of the chosen video, of these samples and of the rejected video: 0 is the best."""


@dataclass(frozen=True, kw_only=True)
class PairErrors:
    """Elementwise squared errors of policy and reference on both videos, in fp32, for a loss.

    Without a reference (`Loss.needs_reference` is False, or the reference `none`) the reference's
    errors are 0, so that a change of error is the error itself. For a loss that does not compare
    the videos, all errors of the rejected one are 0.
    """

    policy_first: Latents
    policy_second: Latents
    reference_first: Latents
    reference_second: Latents
    policy_product: Latents
    """The policy's signed error (prediction less target) on the first video times that on the
    second, without gradient: positive where both errors have the same sign."""
    preference: Preference
    region: Region
    strength: PerPair
    timestep: PerPair
    """The timestep of both videos, in the family's unit."""
    signal: PerPair
    """Factor of the clean latents at this timestep: `sqrt(abar)`, or `1 - sigma` in flow
    matching."""
    noise: PerPair
    """Factor of the noise: `sqrt(1 - abar)`, or `sigma`."""
    progress: PerPair
    """Share of the run's optimizer steps that are done, from 0 to below 1; the same for all
    pairs."""
    between: GroupErrors | None = None
    """Only for a loss that sees groups (`Loss.sees_groups`), and pairs that are groups."""

    def rows(self, rows: slice | Tensor) -> PairErrors:
        """The errors of some of the pairs."""
        parts = {name: value[rows] for name, value in vars(self).items() if name != "between"}
        group = self.between
        if group is not None:
            parts["between"] = GroupErrors(**{k: v[rows] for k, v in vars(group).items()})
        return PairErrors(**parts)

    @property
    def change_first(self) -> Latents:
        """`d(first)`: how much worse than the reference the policy predicts the first video."""
        return self.policy_first - self.reference_first

    @property
    def change_second(self) -> Latents:
        """`d(second)`."""
        return self.policy_second - self.reference_second

    @property
    def label(self) -> PerPair:
        """+1 where most frames prefer the first video, -1 the second, 0 for as many of each."""
        return self.preference.sum(dim=1).sign()

    @property
    def majority(self) -> Preference:
        """`label` for every frame."""
        return self.label[:, None].expand_as(self.preference)


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """One value per pair. The engine derives logits, accuracy and gradient factor from them."""

    loss: PerPair
    margin: PerPair
    """Implicit reward of the chosen video less that of the rejected one, differentiable in the
    policy's errors: `d(rejected) - d(chosen)`, over the elements that the loss compares."""
    chosen_change: PerPair
    """`d(chosen)`: positive when the policy predicts the chosen video worse than the reference."""
    rejected_change: PerPair
    """`d(rejected)`."""


# --- names of a model's parts in other programs -------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoraNames:
    """Names in a file of the two factors of a module's update, `up @ down`."""

    down: str
    up: str


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """Names of a model's parts in diffusers and ComfyUI, for exported adapters."""

    pipeline: str
    """The class of diffusers that runs the model."""
    source: str
    """Hub id or folder of the checkpoint; of the configurations where there is a `file`."""
    revision: str | None
    networks: Mapping[str, Any]
    """diffusers networks of the denoiser by their names in the pipeline. If there are several, the
    module names of the denoiser start with these names."""
    scheduler: Any
    """Scheduler, a class of diffusers."""
    index: Mapping[str, Any]
    """Contents of model_index.json: a part's name to its library and class, and the pipeline's
    options."""
    folder: Callable[[str], Path]
    """Folder of a part of `index`; it may lack weights that are in `file`."""
    copy: Callable[[str, Path], None]
    """Writes a part of `index` into a new folder."""
    comfy: Callable[[str], LoraNames | None]
    """Module of a network to the names of its update in ComfyUI; None if it has none."""
    comfy_usage: str
    """The folder for such files in ComfyUI, and the node that loads them, as a sentence."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Further arguments of the pipeline's `from_pretrained`, as Python, with {source} for the
    checkpoint. Arguments without {source} come from elsewhere; a merged checkpoint has them."""
    file: str | None = None
    """The single file of the first network's weights, if that is where they are."""
    variant: str | None = None
    """Variant ("fp16") of the checkpoint's weights."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of a pipeline call besides size, steps and guidance."""

    def subfolder(self, network: str) -> str:
        """Subfolder of a network's files: its name if there are several networks, else none."""
        return network if len(self.networks) > 1 else "."


@dataclass(frozen=True, kw_only=True)
class LoraUpdate:
    """The update of a linear layer's weight: `scale * up @ down`."""

    down: Float[Tensor, "rank inputs"]
    up: Float[Tensor, "outputs rank"]
    scale: float
    """alpha / rank."""

    @property
    def folded(self) -> Float[Tensor, "outputs rank"]:
        """`scale * up`, in fp32."""
        return self.up.float() * self.scale

    def applied(self, inputs: Float[Tensor, "n inputs"]) -> Float[Tensor, "n outputs"]:
        """The change of the layer's output, in fp32."""
        return inputs @ self.down.float().T @ self.folded.T


LoraDelta = Mapping[str, LoraUpdate]
"""Adapted module of a network to its update."""
