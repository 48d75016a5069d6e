"""Wan: flow matching in a diffusion transformer, behind a causal video VAE."""

from __future__ import annotations

import copy
import html
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

from dpo_video.backbone._prompts import diverse
from dpo_video.diffusion.experts import Experts
from dpo_video.diffusion.pretrained import Checkpoint, Lazy, free, identity, place, place_denoiser
from dpo_video.diffusion.sampling import Schedule, denoise, first_step, frame_by_frame
from dpo_video.errors import UserError
from dpo_video.strategies import Backbone, Sampling, VideoModel
from dpo_video.types import (
    Clip,
    Context,
    ExportSpec,
    Latents,
    LoraNames,
    PerPair,
    Placement,
    Region,
    Videos,
    VideoShape,
)

_STRIDE = 4  # of the VAE in time: the first frame alone, then four at a time
_ATTENTION = re.compile(r"(.*\.)?blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")
# Schedulers by the name that a checkpoint gives, and what they call the shift.
_SCHEDULERS: Mapping[str, tuple[Any, str]] = {
    "UniPCMultistepScheduler": (UniPCMultistepScheduler, "flow_shift"),
    "FlowMatchEulerDiscreteScheduler": (FlowMatchEulerDiscreteScheduler, "shift"),
}


@final
class Wan(Backbone):
    """Wan 2.1 and 2.2, text to video (Wan Team 2025, arXiv 2503.20314).

    Any checkpoint of `WanPipeline`: 2.1 T2V 1.3B and 14B, 2.2 TI2V-5B, and 2.2 T2V-A14B, whose two
    experts share the noise levels between them. Trained as LocalDPO trains Wan2.1-1.3B (Huang et
    al. 2026, arXiv 2601.04068): LoRA of rank 64 on all attention projections. `img2img` pairs treat
    every latent frame as a video of one frame.
    """

    guards: ClassVar[tuple[str, ...]] = ("sharpness",)
    # LocalDPO's table, and its authors' train_wanx_base.sh.
    training: ClassVar[Mapping[str, Any]] = {
        "rank": 64,
        "alpha": 128.0,
        "learning_rate": 5e-6,
        "betas": (0.9, 0.95),
        "weight_decay": 1e-3,
        "warmup_steps": 10,
    }

    model: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    """Hub id or folder of a checkpoint in diffusers' layout, such as
    Wan-AI/Wan2.1-T2V-14B-Diffusers, Wan-AI/Wan2.2-TI2V-5B-Diffusers (704x1280, 24 fps) or
    Wan-AI/Wan2.2-T2V-A14B-Diffusers."""
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
    """Shift of the sampling schedule towards noise; the checkpoint's own when not set. Wan's advice
    is 3 for 480p and 5 for 720p."""
    timestep_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """How training draws its noise levels sigma, before they are shifted: the sigmoid of N(0, 1),
    as DenseDPO and LocalDPO do, or uniform in (0, 1)."""
    timestep_shift: float | None = Field(default=None, gt=0)
    """Shift of the levels in training; when not set, 1 (none, as those two), or the sampling
    schedule's for a model of two experts, whose high-noise one would else see a level in 40."""
    experts: Literal["both", "high", "low"] = "both"
    """Which experts of A14B train: "high" and "low" keep the levels to that expert's own, and the
    adapter to it."""
    idle_expert: Literal["host", "device"] = "host"
    """Where A14B's other expert waits. On the device it takes 28 GB, and saves the transfers."""
    guidance_2: float | None = Field(default=None, ge=0)
    """Classifier-free guidance of A14B's low-noise expert; the same as the other's when not set."""
    negative_prompt: str = ""
    """What sampling is guided away from."""
    text_length: int = Field(default=512, ge=1)
    """Tokens of a prompt; longer ones are cut."""

    @field_validator("frames")
    @classmethod
    def _fills_latents(cls, frames: int) -> int:
        below = (frames - 1) // _STRIDE * _STRIDE + 1
        if frames != below:
            raise ValueError(
                f"the VAE takes 1 frame and then {_STRIDE} at a time; choose {below} or "
                f"{below + _STRIDE}"
            )
        return frames

    def load(self, placement: Placement) -> VideoModel:
        """Load the denoiser; a UserError if a part is missing or does not fit."""
        dtype = placement.dtype
        checkpoint = Checkpoint(source=self.model, revision=self.revision, placement=placement)
        index = checkpoint.config(file="model_index.json")
        if index.get("_class_name") != "WanPipeline":
            raise UserError(
                f"'{self.model}' is a checkpoint of {index.get('_class_name')}, not of "
                "WanPipeline. Name one that makes videos of text alone (--set backbone.model=...)."
            )
        boundary = index.get("boundary_ratio")
        names = ["transformer"] if boundary is None else ["transformer", "transformer_2"]
        if boundary is None and self.experts != "both":
            raise UserError(
                f"'{self.model}' has one denoiser for all noise levels, so there is no "
                f"'{self.experts}' expert. Leave backbone.experts out."
            )
        config = checkpoint.full_config(WanTransformer3DModel, "transformer")
        vae_config = checkpoint.full_config(AutoencoderKLWan, "vae")
        _check_shape(self, config, vae_config)
        scheduler = _scheduler(checkpoint, self.shift)
        networks = [
            checkpoint.load(WanTransformer3DModel.from_pretrained, name, torch_dtype=dtype)
            for name in names
        ]
        denoiser: nn.Module = networks[0]
        if boundary is not None:
            denoiser = Experts(
                *networks,
                boundary=boundary * scheduler.config.num_train_timesteps,
                park=self.idle_expert == "host",
            )
        return WanModel(
            options=self,
            denoiser=place_denoiser(denoiser, placement),
            vae=Lazy(lambda: _load_vae(checkpoint)),
            text=Lazy(lambda: _load_text(checkpoint)),
            scheduler=scheduler,
            vae_config=vae_config,
            patch=config["patch_size"],
            expand_timesteps=index.get("expand_timesteps", False),
            checkpoint=checkpoint,
            identity=identity(
                checkpoint.digest(*names, "vae", "text_encoder", "scheduler"), dtype=dtype
            ),
        )

    def clips(self, seed: int) -> Iterator[Clip] | None:
        """This family has no clips of its own."""
        return None

    def prompts(self, n: int) -> list[str]:
        """Eight diverse prompts, cycled."""
        return diverse(n)


@final
@dataclass(frozen=True, kw_only=True)
class _Text:
    tokenizer: Any
    encoder: UMT5EncoderModel


def cleaned(prompt: str) -> str:
    """A prompt as diffusers' WanPipeline cleans it: mended by ftfy if that is installed.

    Written anew, since importing the pipeline takes seconds.
    """
    if importlib.util.find_spec("ftfy") is not None:
        prompt = importlib.import_module("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def _load_vae(checkpoint: Checkpoint) -> AutoencoderKLWan:
    # Always fp32, as diffusers' documentation of Wan has it: half precision shows in the pixels.
    vae = checkpoint.load(AutoencoderKLWan.from_pretrained, "vae", torch_dtype=torch.float32)
    return place(vae, checkpoint.placement)


def _load_text(checkpoint: Checkpoint) -> _Text:
    encoder = checkpoint.load(
        UMT5EncoderModel.from_pretrained, "text_encoder", dtype=checkpoint.placement.dtype
    )
    return _Text(
        tokenizer=checkpoint.load(AutoTokenizer.from_pretrained, "tokenizer"),
        encoder=place(encoder, checkpoint.placement),
    )


def _scheduler(checkpoint: Checkpoint, shift: float | None) -> Any:
    config = checkpoint.config("scheduler", "scheduler_config.json")
    name = config.get("_class_name", "")
    flows = config.get("prediction_type", "flow_prediction") == "flow_prediction"
    if name not in _SCHEDULERS or not flows:
        raise UserError(
            f"The scheduler of '{checkpoint.source}' is {name or 'not named'}"
            f"{'' if flows else ', which predicts no flow'}. Use a checkpoint with "
            f"{' or '.join(_SCHEDULERS)} (Wan's own have the first)."
        )
    scheduler, shift_name = _SCHEDULERS[name]
    return scheduler.from_config(config, **({} if shift is None else {shift_name: shift}))


def _check_shape(options: Wan, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """A UserError if the denoiser does not take the VAE's latents, or not of such videos."""
    if denoiser["in_channels"] != vae["z_dim"]:
        raise UserError(
            f"The denoiser of '{options.model}' takes {denoiser['in_channels']} channels, and its "
            f"VAE makes {vae['z_dim']}: it wants an image beside the noise. Name a checkpoint that "
            "makes videos of text alone (--set backbone.model=...)."
        )
    for axis, patch in zip(("height", "width"), denoiser["patch_size"][1:], strict=True):
        unit, pixels = vae["scale_factor_spatial"] * patch, getattr(options, axis)
        if pixels % unit:
            below = max(1, pixels // unit) * unit
            raise UserError(
                f"backbone.{axis} = {pixels} is no multiple of {unit}, which '{options.model}' "
                f"needs. Choose {below} or {below + unit}."
            )


@final
class WanModel(VideoModel):
    """A loaded Wan model. Levels are timesteps, 1000 times sigma, and not only whole ones."""

    def __init__(
        self,
        *,
        options: Wan,
        denoiser: nn.Module,
        vae: Lazy[AutoencoderKLWan],
        text: Lazy[_Text],
        scheduler: Any,
        vae_config: Mapping[str, Any],
        patch: Sequence[int],
        expand_timesteps: bool,
        checkpoint: Checkpoint,
        identity: str,
    ) -> None:
        self.denoiser, self.scheduler = denoiser, scheduler
        self.device, self.dtype = checkpoint.placement.device, checkpoint.placement.dtype
        self.identity, self._checkpoint = identity, checkpoint
        self.shape = VideoShape(
            frames=options.frames, height=options.height, width=options.width, fps=options.fps
        )
        self.sampling = Sampling(
            num_inference_steps=50, guidance_scale=5.0
        )  # diffusers' WanPipeline
        self._options, self._vae, self._text = options, vae, text
        self._vae_config = vae_config
        self._patch, self._expand_timesteps = patch, expand_timesteps
        self._timesteps: int = scheduler.config.num_train_timesteps
        self._boundary = denoiser.boundary if isinstance(denoiser, Experts) else None
        self._negative: Tensor | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """`(c, f, h, w)`: one latent frame for the first frame, and one for every four after it."""
        unit, shape = self._vae_config["scale_factor_spatial"], self.shape
        frames = (shape.frames - 1) // _STRIDE + 1
        return self._vae_config["z_dim"], frames, shape.height // unit, shape.width // unit

    @torch.no_grad()
    def encode_videos(self, videos: Videos) -> Latents:
        """The posterior's mean, less the latents' mean, divided by their standard deviation."""
        vae = self._vae.get()
        pixels = 2 * videos.to(self.device, vae.dtype) - 1
        # One at a time: at 81 frames in 480p, a video fills a card.
        latents = torch.cat([vae.encode(video[None]).latent_dist.mean for video in pixels])
        mean, deviation = self._statistics(vae)
        return (latents - mean) / deviation

    @torch.no_grad()
    def decode_videos(self, latents: Latents) -> Videos:
        """The way back, to [0, 1]."""
        vae = self._vae.get()
        mean, deviation = self._statistics(vae)
        raw = latents.to(self.device, vae.dtype) * deviation + mean
        pixels = torch.cat([vae.decode(video[None]).sample for video in raw])
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _statistics(self, vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel over Wan's training videos."""
        mean, deviation = (
            torch.tensor(values, device=self.device, dtype=vae.dtype).view(-1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return mean, deviation

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Context:
        """UMT5's last hidden states `[b, tokens, channels]`, zero behind the prompt's last."""
        text = self._text.get()
        tokens = text.tokenizer(
            [cleaned(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self._options.text_length,
            return_tensors="pt",
        ).to(self.device)
        mask = tokens["attention_mask"]
        hidden = text.encoder(tokens["input_ids"], mask).last_hidden_state
        return {"prompt_embeds": hidden.masked_fill(mask[..., None] == 0, 0.0)}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """One vector a token, as many as a prompt is filled up to."""
        network = self.denoiser
        if isinstance(network, Experts):
            network = network.transformer
        config: Any = network.config
        return {"prompt_embeds": (self._options.text_length, config["text_dim"])}

    def sample_timesteps(self, n: int, generator: Generator) -> PerPair:
        """Levels by the inverse of their distribution, kept to the experts that train."""
        options, boundary = self._options, self._boundary
        shift = options.timestep_shift
        if shift is None:
            shift = 1.0 if boundary is None else self._sampling_shift
        low, high = 0.0, 1.0
        if boundary is not None and options.experts != "both":
            share = self._cumulative(boundary / self._timesteps, shift)
            low, high = (share, 1.0) if options.experts == "high" else (0.0, share)
        drawn = low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
        if options.timestep_sampling == "logit_normal":
            drawn = torch.special.ndtri(drawn).sigmoid()
        sigmas = shift * drawn / (1 + (shift - 1) * drawn)
        return (sigmas * self._timesteps).float()

    def _cumulative(self, sigma: float, shift: float) -> float:
        """The share of the levels below `sigma`, if all are drawn."""
        unshifted = torch.tensor(sigma / (shift - (shift - 1) * sigma), dtype=torch.float64)
        if self._options.timestep_sampling == "logit_normal":
            return torch.special.ndtr(torch.logit(unshifted)).item()
        return unshifted.item()

    @property
    def _sampling_shift(self) -> float:
        _, name = _SCHEDULERS[type(self.scheduler).__name__]
        return float(self.scheduler.config[name])

    def add_noise(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """`(1 - sigma) clean + sigma noise`."""
        sigma = (timestep.to(clean.device) / self._timesteps).view(-1, 1, 1, 1, 1)
        return ((1 - sigma) * clean + sigma * noise).to(clean.dtype)

    def target(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """The flow's velocity, whatever the level."""
        return noise - clean

    def predict(
        self, denoiser: nn.Module, noisy: Latents, timestep: PerPair, context: Context
    ) -> Latents:
        """One forward pass, in the weights' precision."""
        timestep = timestep.to(noisy.device)
        if self._expand_timesteps:  # TI2V takes one a token: an image's tokens would have level 0
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

    @torch.no_grad()
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
        """As diffusers' WanPipeline with the checkpoint's scheduler and shift.

        A share of the schedule is a share of its steps; the noise is that of the first step's own
        sigma on the shifted table. Repainting and the multistep solver get along: it works element
        by element, and so never mixes what is outside the region into what is inside.
        """
        if per_frame:
            return frame_by_frame(
                self.sample,
                context,
                noise,
                clean=clean,
                region=region,
                denoiser=denoiser,
                strength=strength,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            )
        scheduler = copy.deepcopy(self.scheduler)  # multistep solvers remember
        scheduler.set_timesteps(
            self.sampling.num_inference_steps
            if num_inference_steps is None
            else num_inference_steps
        )
        times = scheduler.timesteps.float()
        exact = scheduler.sigmas * self._timesteps  # of which UniPC's timesteps are whole numbers
        first = first_step(strength, len(times))
        scheduler.set_begin_index(first)

        def step(prediction: Latents, index: int, latents: Latents) -> Latents:
            time = scheduler.timesteps[index]
            stepped: Latents = scheduler.step(prediction, time, latents, return_dict=False)[0]
            return stepped

        high = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        low = high
        if guidance_scale is None and self._options.guidance_2 is not None:
            low = self._options.guidance_2
        scales = [low if self._boundary and time < self._boundary else high for time in times]
        return denoise(
            self,
            self.denoiser if denoiser is None else denoiser,
            Schedule(
                timesteps=times, exact_timesteps=exact[:-1], next_timesteps=exact[1:], step=step
            ),
            context,
            noise.float(),
            empty=self._empty(len(noise)) if high > 1 else None,
            guidance_scale=scales,
            first=first,
            clean=clean,
            region=region,
        )

    def strength_at(self, sigma: float, num_inference_steps: int | None = None) -> float:
        """The steps from the first sigma <= `noise_level` on, at least one, of all of them."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(
            self.sampling.num_inference_steps
            if num_inference_steps is None
            else num_inference_steps
        )
        sigmas = scheduler.sigmas[:-1]  # the last one is 0
        return max(1, int((sigmas <= sigma).sum())) / len(sigmas)

    def _empty(self, count: int) -> Context:
        if self._negative is None:
            self._negative = self.encode_prompts([self._options.negative_prompt])["prompt_embeds"]
        return {"prompt_embeds": self._negative.expand(count, -1, -1)}

    def latent_frames(self, segment: slice) -> slice:
        """Latent 0 is frame 0, latent k the frames 4k - 3 to 4k."""
        start, stop, _ = segment.indices(self.shape.frames)
        return slice(-(-start // _STRIDE), -(-(stop - 1) // _STRIDE) + 1)

    def lora_targets(self) -> list[str]:
        """The projections of self- and cross-attention, of the experts that train."""
        prefix = {"both": "", "high": "transformer.", "low": "transformer_2."}
        within = prefix[self._options.experts]
        return [
            name
            for name, _ in self.denoiser.named_modules()
            if _ATTENTION.fullmatch(name) and name.startswith(within)
        ]

    def release(self) -> None:
        """Free VAE and text encoder; the encoded negative prompt stays."""
        free(self._vae, self._text)

    def export_spec(self) -> ExportSpec:
        """As diffusers' WanPipeline and ComfyUI call it."""
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
            source=options.model,
            revision=options.revision,
            networks=networks,
            scheduler=self.scheduler,
            index=self._checkpoint.config(file="model_index.json"),
            folder=self._checkpoint.folder,
            comfy=comfy_names,
            comfy_usage="For Wan in ComfyUI: put the .safetensors file into `models/loras` and "
            "choose it in the node LoraLoaderModelOnly.",
            arguments={} if self.dtype is torch.float32 else {"vae": vae},
            call={key: value for key, value in call.items() if value is not None},
        )


_IN_BLOCK = re.compile(r"(?P<block>blocks\.\d+)\.(?P<layer>.+)")
_COMFY_LAYERS: Mapping[str, str] = {
    **{
        f"attn{number}.{ours}": f"{theirs}_attn.{projection}"
        for number, theirs in ((1, "self"), (2, "cross"))
        for ours, projection in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    },
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def comfy_names(module: str) -> LoraNames | None:
    """Wan's own names of its modules, behind `diffusion_model.` as in all of ComfyUI's LoRAs.

    huggingface/diffusers, scripts/convert_wan_to_diffusers.py: TRANSFORMER_KEYS_RENAME_DICT, the
    other way round; Comfy-Org/ComfyUI, comfy/lora.py: model_lora_keys_unet ("generic lora format").
    """
    found = _IN_BLOCK.fullmatch(module)
    if found is None or found["layer"] not in _COMFY_LAYERS:
        return None
    stem = f"diffusion_model.{found['block']}.{_COMFY_LAYERS[found['layer']]}"
    return LoraNames(down=f"{stem}.lora_A.weight", up=f"{stem}.lora_B.weight")
