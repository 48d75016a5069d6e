"""Wan: a flow-matching diffusion transformer on the latents of a causal VAE."""

from __future__ import annotations

import copy
import html
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from pydantic import Field, field_validator
from torch import Generator, Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

from dpo_video.backbone import _causal_vae, _comfy
from dpo_video.backbone._causal_vae import STRIDE
from dpo_video.backbone._flow import SigmaDistribution, TimestepSampling
from dpo_video.backbone._pretrained import (
    PretrainedBackbone,
    PretrainedModel,
    refuse_dynamic,
    to_pixels,
)
from dpo_video.diffusion.experts import Experts
from dpo_video.diffusion.pretrained import Checkpoint, Lazy, identity, place, place_denoiser
from dpo_video.diffusion.sampling import Schedule, denoise, first_step
from dpo_video.diffusion.single_file import FilePart
from dpo_video.errors import UserError
from dpo_video.paths import ModelSource
from dpo_video.strategies import Sampling, VideoModel
from dpo_video.types import (
    Context,
    ExportSpec,
    Latents,
    PerPair,
    Placement,
    Region,
    Videos,
    VideoShape,
)

# Schedulers by the name in a checkpoint, and the name of their shift option.
_SCHEDULERS: Mapping[str, tuple[Any, str]] = {
    "UniPCMultistepScheduler": (UniPCMultistepScheduler, "flow_shift"),
    "FlowMatchEulerDiscreteScheduler": (FlowMatchEulerDiscreteScheduler, "shift"),
}


@final
class Wan(PretrainedBackbone):
    """Wan 2.1 and 2.2: flow-matching text-to-video transformers (Wan Team 2025, arXiv 2503.20314).

    Any checkpoint of `WanPipeline`: 2.1 T2V 1.3B and 14B, 2.2 TI2V-5B, and 2.2 T2V-A14B with a
    high-noise and a low-noise expert. Defaults are LocalDPO's for Wan2.1-1.3B (Huang et al. 2026,
    arXiv 2601.04068): LoRA of rank 64 on all attention projections. There is no image model:
    `img2img` pairs re-noise every latent frame as a video of one frame, which is an adaptation of
    Video-DPO's method.
    """

    # LocalDPO's table, and its authors' train_wanx_base.sh.
    efficiency: ClassVar[float] = 0.45  # measured: 0.42 to 0.47 on an H200, at 81 frames of 480p
    training: ClassVar[Mapping[str, Any]] = {
        "rank": 64,
        "alpha": 128.0,
        "learning_rate": 5e-6,
        "betas": (0.9, 0.95),
        "weight_decay": 1e-3,
        "warmup_steps": 10,
    }

    model: ModelSource = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    """Hub id or folder of a checkpoint in diffusers' layout, such as
    Wan-AI/Wan2.1-T2V-14B-Diffusers, Wan-AI/Wan2.2-TI2V-5B-Diffusers (704x1280, 24 fps) or
    Wan-AI/Wan2.2-T2V-A14B-Diffusers, or a transformer as one .safetensors file."""
    config: ModelSource | None = None
    """Where `model` is a single file: hub id or folder of everything but the transformer. Default:
    the only known model of the same shapes."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    frames: int = Field(default=81, ge=1)
    """Frames of a video: one more than a multiple of 4."""
    height: int = Field(default=480, ge=16, multiple_of=16)
    """Pixels; of TI2V-5B a multiple of 32."""
    width: int = Field(default=832, ge=16, multiple_of=16)
    """Pixels; of TI2V-5B a multiple of 32."""
    fps: float = Field(default=16.0, gt=0)
    """Frames per second that clips are resampled to."""
    shift: float | None = Field(default=None, gt=0)
    """Shift of the sampling schedule towards noise; the checkpoint's own when not set. Wan
    recommends 3 for 480p and 5 for 720p."""
    timestep_sampling: TimestepSampling = "logit_normal"
    """Distribution of the training timesteps (sigma times 1000), before the shift: "logit_normal",
    the sigmoid of N(0, 1), as in DenseDPO and LocalDPO, or "uniform"."""
    timestep_shift: float | None = Field(default=None, gt=0)
    """Shift of the training timesteps towards noise. When not set, 1 (none, as in DenseDPO and
    LocalDPO), or the sampling schedule's shift for a model with two experts: without it, the
    high-noise expert would get one timestep in 40."""
    experts: Literal["both", "high", "low"] = "both"
    """Experts of A14B to train. With "high" or "low", only that expert gets a LoRA and only its
    timesteps are drawn."""
    idle_expert: Literal["host", "device"] = "host"
    """Where A14B's idle expert is kept: CPU memory or the device, where it takes 28 GB and needs no
    transfers."""
    guidance_2: float | None = Field(default=None, ge=0)
    """Guidance scale of A14B's low-noise expert; the high-noise expert's when not set."""
    negative_prompt: str = ""
    """Negative prompt of classifier-free guidance."""
    text_length: int = Field(default=512, ge=1)
    """Tokens per prompt; longer prompts are truncated."""
    tiling: bool = False
    """Encode and decode videos in tiles: less memory, more time, slightly different pixels."""

    @field_validator("frames")
    @classmethod
    def _fills_latents(cls, frames: int) -> int:
        below = (frames - 1) // STRIDE * STRIDE + 1
        if frames != below:
            raise ValueError(
                f"the VAE takes 1 frame, then {STRIDE} at a time; choose {below} or "
                f"{below + STRIDE}"
            )
        return frames

    def load(self, placement: Placement) -> VideoModel:
        """Load the denoiser; a UserError if a part is missing or does not fit."""
        checkpoint = Checkpoint(
            source=self.model,
            revision=self.revision,
            placement=placement,
            parts_in_file={"transformer": FilePart(network=WanTransformer3DModel)},
            config_source=self.config,
        )
        index = checkpoint.config(file="model_index.json")
        if index.get("_class_name") != "WanPipeline":
            raise UserError(
                f"'{self.model}' is a checkpoint of {index.get('_class_name')}, not of "
                "WanPipeline. Name a text-to-video one (--set backbone.model=...)."
            )
        boundary = index.get("boundary_ratio")
        names = ["transformer"] if boundary is None else ["transformer", "transformer_2"]
        if boundary is None and self.experts != "both":
            raise UserError(
                f"'{self.model}' has one denoiser for all timesteps, so there is no "
                f"'{self.experts}' expert. Leave backbone.experts out."
            )
        config = checkpoint.full_config(WanTransformer3DModel, "transformer")
        vae_config = checkpoint.full_config(AutoencoderKLWan, "vae")
        _check_shape(self, config, vae_config)
        scheduler = _scheduler(checkpoint, self.shift)
        networks = [checkpoint.load(WanTransformer3DModel, name) for name in names]
        denoiser: nn.Module = networks[0]
        if boundary is not None:
            denoiser = Experts(
                *networks,
                boundary=boundary * scheduler.config.num_train_timesteps,
                park=self.idle_expert == "host",
            )
        return WanModel(
            self,
            checkpoint,
            denoiser=place_denoiser(denoiser, placement),
            scheduler=scheduler,
            vae_config=vae_config,
            patch=config["patch_size"],
            expand_timesteps=index.get("expand_timesteps", False),
            identity=identity(
                checkpoint.digest(*names, "vae", "text_encoder", "scheduler"),
                dtype=placement.dtype,
            ),
        )


def cleaned(prompt: str) -> str:
    """Clean a prompt as diffusers' WanPipeline does, with ftfy if that is installed.

    Not imported from there, since importing the pipeline takes seconds.
    """
    if importlib.util.find_spec("ftfy") is not None:
        prompt = importlib.import_module("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def _scheduler(checkpoint: Checkpoint, shift: float | None) -> Any:
    config = checkpoint.config("scheduler", "scheduler_config.json")
    name = config.get("_class_name", "")
    flows = config.get("prediction_type", "flow_prediction") == "flow_prediction"
    if name not in _SCHEDULERS or not flows:
        raise UserError(
            f"The scheduler of '{checkpoint.source}' is {name or 'not named'}"
            f"{'' if flows else ', which does not predict flow'}. Use a checkpoint with "
            f"{' or '.join(_SCHEDULERS)} (Wan's own have the first)."
        )
    scheduler, shift_name = _SCHEDULERS[name]
    return scheduler.from_config(config, **({} if shift is None else {shift_name: shift}))


def _load_vae(checkpoint: Checkpoint, tiling: bool) -> AutoencoderKLWan:
    # Always fp32, as diffusers' documentation of Wan recommends: half precision shows.
    vae = checkpoint.load(AutoencoderKLWan, "vae", dtype=torch.float32)
    vae = place(vae, checkpoint.placement)
    if tiling:
        vae.enable_tiling()
    return vae


def _check_shape(options: Wan, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """A UserError if the denoiser does not take the VAE's latents, or latents of this shape."""
    if denoiser["in_channels"] != vae["z_dim"]:
        raise UserError(
            f"The denoiser of '{options.model}' takes {denoiser['in_channels']} channels, and its "
            f"VAE makes {vae['z_dim']}: it takes an image as input. Name a text-to-video "
            "checkpoint (--set backbone.model=...)."
        )
    for axis, patch in zip(("height", "width"), denoiser["patch_size"][1:], strict=True):
        unit, pixels = vae["scale_factor_spatial"] * patch, getattr(options, axis)
        if pixels % unit:
            below = max(1, pixels // unit) * unit
            raise UserError(
                f"backbone.{axis} = {pixels} is not a multiple of {unit}, as '{options.model}' "
                f"needs. Choose {below} or {below + unit}."
            )
        if pixels // unit > (most := denoiser.get("rope_max_seq_len", 1024)):
            raise UserError(
                f"backbone.{axis} = {pixels} is more than '{options.model}' has positions for. "
                f"Choose {most * unit} or less (--set backbone.{axis}={most * unit})."
            )


@final
class WanModel(PretrainedModel):
    """A loaded Wan model. Its timesteps are 1000 times sigma, and need not be whole numbers."""

    attention: ClassVar[re.Pattern[str]] = re.compile(
        r"(.*\.)?blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
    )

    def __init__(
        self,
        options: Wan,
        checkpoint: Checkpoint,
        *,
        denoiser: nn.Module,
        scheduler: Any,
        vae_config: Mapping[str, Any],
        patch: Sequence[int],
        expand_timesteps: bool,
        identity: str,
    ) -> None:
        super().__init__(
            checkpoint,
            shape=VideoShape(
                frames=options.frames, height=options.height, width=options.width, fps=options.fps
            ),
            # diffusers' WanPipeline
            sampling=Sampling(num_inference_steps=50, guidance_scale=5.0),
            vae=Lazy(lambda: _load_vae(checkpoint, options.tiling)),
            vae_config=vae_config,
            text_encoder=checkpoint.lazy(UMT5EncoderModel, "text_encoder"),
            negative_prompt=options.negative_prompt,
        )
        self.denoiser, self.scheduler, self.identity = denoiser, scheduler, identity
        self._tokenizer: Lazy[Any] = Lazy(lambda: checkpoint.load(AutoTokenizer, "tokenizer"))
        self._options = options
        self._patch, self._expand_timesteps = patch, expand_timesteps
        self._timesteps: int = scheduler.config.num_train_timesteps
        self._boundary = denoiser.boundary if isinstance(denoiser, Experts) else None

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """`(c, f, h, w)` of the causal VAE."""
        unit, shape = self._vae_config["scale_factor_spatial"], self.shape
        frames = _causal_vae.latent_count(shape.frames)
        return self._vae_config["z_dim"], frames, shape.height // unit, shape.width // unit

    @torch.no_grad()
    def encode_videos(self, videos: Videos) -> Latents:
        """Encode: the posterior's mean, standardized by the statistics of Wan's latents."""
        pixels = 2 * videos.to(self.device, self.vae.dtype) - 1
        # One at a time: at 81 frames in 480p, one video fills a GPU.
        latents = torch.cat([self.vae.encode(video[None]).latent_dist.mean for video in pixels])
        mean, deviation = self._statistics()
        return (latents - mean) / deviation

    @torch.no_grad()
    def decode_videos(self, latents: Latents) -> Videos:
        """Decode to [0, 1]."""
        mean, deviation = self._statistics()
        raw = latents.to(self.device, self.vae.dtype) * deviation + mean
        return to_pixels(torch.cat([self.vae.decode(video[None]).sample for video in raw]))

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel over Wan's training videos."""
        mean, deviation = (
            torch.tensor(values, device=self.device, dtype=self.vae.dtype).view(-1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return mean, deviation

    @property
    def _reader(self) -> tuple[Any, int]:
        return self._tokenizer.get(), self._options.text_length

    def _cleaned(self, prompt: str) -> str:
        return cleaned(prompt)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Context:
        """UMT5's last hidden states `[b, tokens, channels]`, zero behind the end of the prompt."""
        tokens = self._tokens(prompts)
        mask = tokens["attention_mask"]
        hidden = self.text_encoder(tokens["input_ids"], mask).last_hidden_state
        return {"prompt_embeds": hidden.masked_fill(mask[..., None] == 0, 0.0)}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """One vector per token, as many as prompts are padded to."""
        network = self.denoiser
        if isinstance(network, Experts):
            network = network.transformer
        config: Any = network.config
        return {"prompt_embeds": (self._options.text_length, config["text_dim"])}

    def sample_timesteps(self, n: int, generator: Generator) -> PerPair:
        """Draw timesteps of the experts that train."""
        options, boundary = self._options, self._boundary
        shift = options.timestep_shift
        if shift is None:
            shift = 1.0 if boundary is None else self._sampling_shift
        low, high = 0.0, 1.0
        if boundary is not None and options.experts != "both":
            middle = boundary / self._timesteps
            low, high = (middle, 1.0) if options.experts == "high" else (0.0, middle)
        sigmas = SigmaDistribution(
            sampling=options.timestep_sampling, shift=shift, low=low, high=high
        )
        return (sigmas.sample(n, generator) * self._timesteps).float()

    @property
    def _sampling_shift(self) -> float:
        _, name = _SCHEDULERS[type(self.scheduler).__name__]
        return float(self.scheduler.config[name])

    def add_noise(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """`(1 - sigma) clean + sigma noise`."""
        sigma = (timestep.to(clean.device) / self._timesteps).view(-1, 1, 1, 1, 1)
        return ((1 - sigma) * clean + sigma * noise).to(clean.dtype)

    def target(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """The flow velocity, the same at all timesteps."""
        return noise - clean

    def predict(
        self, denoiser: nn.Module, noisy: Latents, timestep: PerPair, context: Context
    ) -> Latents:
        """One forward pass, in the weights' precision."""
        timestep = timestep.to(noisy.device)
        if self._expand_timesteps:  # TI2V takes one per token: an image's tokens would have 0
            tokens = math.prod(
                size // patch for size, patch in zip(noisy.shape[2:], self._patch, strict=True)
            )
            timestep = timestep[:, None].expand(-1, tokens)
        prediction: Latents = denoiser(
            noisy.to(self.dtype),
            timestep,
            context["prompt_embeds"].to(noisy.device, self.dtype),
            return_dict=False,
        )[0]
        return prediction

    def _sample(
        self,
        context: Context,
        noise: Latents,
        *,
        denoiser: nn.Module,
        clean: Latents | None,
        strength: float,
        region: Region | None,
        steps: int,
        guidance_scale: float | None,
        negative_prompt: str,
        dynamic_guidance: bool | None,
    ) -> Latents:
        """As diffusers' WanPipeline with the checkpoint's scheduler and shift.

        `strength` is a share of the steps; the noise added to `clean` is that of the first step's
        sigma on the shifted schedule. A multistep solver works elementwise, so that with `region`
        nothing from outside the region enters it.
        """
        refuse_dynamic(dynamic_guidance)
        scheduler = self._scheduler_with(steps)
        timesteps = scheduler.timesteps.float()
        exact = scheduler.sigmas * self._timesteps  # UniPC rounds its timesteps
        first = first_step(strength, len(timesteps))
        scheduler.set_begin_index(first)

        def step(prediction: Latents, index: int, latents: Latents) -> Latents:
            timestep = scheduler.timesteps[index]
            stepped: Latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
            return stepped

        high = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        low = high
        if guidance_scale is None and self._options.guidance_2 is not None:
            low = self._options.guidance_2
        boundary = self._boundary or 0.0
        return denoise(
            self,
            denoiser,
            Schedule(
                timesteps=timesteps, exact_timesteps=exact[:-1], next_timesteps=exact[1:], step=step
            ),
            context,
            noise.float(),
            empty=self._negative_context(negative_prompt, len(noise)) if high > 1 else None,
            guidance_scale=[low if timestep < boundary else high for timestep in timesteps],
            first=first,
            clean=clean,
            region=region,
        )

    def _scheduler_with(self, steps: int) -> Any:
        scheduler = copy.deepcopy(self.scheduler)  # multistep solvers have a state
        scheduler.set_timesteps(steps)
        return scheduler

    def strength_at(self, sigma: float, num_inference_steps: int | None = None) -> float:
        """Share of the steps whose sigma is at most `sigma`, and at least one step."""
        steps = num_inference_steps
        scheduler = self._scheduler_with(
            self.sampling.num_inference_steps if steps is None else steps
        )
        sigmas = scheduler.sigmas[:-1]  # the last one is 0
        return max(1, int((sigmas <= sigma).sum())) / len(sigmas)

    def latent_frames(self, segment: slice) -> slice:
        """The latent frames of the causal VAE."""
        return _causal_vae.latent_frames(segment, self.shape.frames)

    def lora_targets(self) -> list[str]:
        """The projections of self- and cross-attention, of the experts that train."""
        prefix = {"both": "", "high": "transformer.", "low": "transformer_2."}
        within = prefix[self._options.experts]
        return [name for name in super().lora_targets() if name.startswith(within)]

    def export_spec(self) -> ExportSpec:
        """Names in diffusers' WanPipeline and ComfyUI."""
        options, networks = self._options, {"transformer": self.denoiser}
        if isinstance(self.denoiser, Experts):
            networks = dict(self.denoiser.named_children())
        vae = 'AutoencoderKLWan.from_pretrained({source}, subfolder="vae")'  # fp32, as here
        call = {
            "negative_prompt": options.negative_prompt or None,
            "guidance_scale_2": options.guidance_2,
            "max_sequence_length": None if options.text_length == 512 else options.text_length,
        }
        return ExportSpec(
            pipeline="WanPipeline",
            **self._checkpoint.exported("transformer"),
            networks=networks,
            scheduler=self.scheduler,
            index=self._checkpoint.config(file="model_index.json"),
            comfy=_comfy.wan,
            comfy_usage="For Wan in ComfyUI: put the .safetensors file into `models/loras` and "
            "choose it in the node LoraLoaderModelOnly.",
            arguments={} if self.dtype is torch.float32 else {"vae": vae},
            call={key: value for key, value in call.items() if value is not None},
        )
