"""AnimateDiff: Stable Diffusion's UNet with motion modules between its layers."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from pydantic import Field
from torch import Generator, Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from dpo_video.errors import UserError
from dpo_video.strategies import Backbone, Sampling, VideoModel
from dpo_video.types import Clip, Context, Latents, PerPair, Region, Videos, VideoShape

_ATTENTION = re.compile(r".*motion_modules.*\.(to_q|to_k|to_v|to_out\.0)$")
_PROMPTS = (
    "a cinematic shot of an old lighthouse at dusk",
    "a drone flies over snowy mountains",
    "water splashes in slow motion",
    "timelapse of clouds over a valley",
    "a walk through a forest in autumn",
    "ocean waves roll onto a beach",
    "a city at night with moving traffic",
    "a fox runs through tall grass",
)
_FRAMES_AT_ONCE = 64  # through the VAE


@final
class AnimateDiff(Backbone):
    """Stable Diffusion 1.5 with a motion adapter (Guo et al. 2023, arXiv 2307.04725)."""

    guards: ClassVar[tuple[str, ...]] = ("sharpness",)

    model: str = "emilianJR/epiCRealism"
    """Hub id or folder of the base model. A folder whose UNet already has motion modules needs no
    adapter."""
    motion_adapter: str = "guoyww/animatediff-motion-adapter-v1-5-2"
    """Hub id or folder of the motion adapter."""
    frames: int = Field(default=16, ge=2, le=32)
    """Frames of a video."""
    height: int = Field(default=512, multiple_of=8)
    """Pixels."""
    width: int = Field(default=512, multiple_of=8)
    """Pixels."""
    fps: float = Field(default=8.0, gt=0)
    """Frames per second that clips are resampled to."""

    def load(self, device: torch.device, dtype: torch.dtype) -> VideoModel:
        """Load the parts; a UserError if one is missing."""
        shape = VideoShape(frames=self.frames, height=self.height, width=self.width, fps=self.fps)
        return load_folder(
            self.model,
            device=device,
            dtype=dtype,
            shape=shape,
            sampling=Sampling(steps=25, guidance=7.5),
            motion_adapter=self.motion_adapter,
        )

    def clips(self, seed: int) -> Iterator[Clip] | None:
        """This family has no clips of its own."""
        return None

    def prompts(self, n: int) -> list[str]:
        """Eight diverse prompts, cycled."""
        return [_PROMPTS[i % len(_PROMPTS)] for i in range(n)]


def load_folder(
    model: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    shape: VideoShape,
    sampling: Sampling,
    motion_adapter: str | Path | None = None,
) -> VideoModel:
    """Load a checkpoint in diffusers' layout, by hub id or by path.

    If its UNet is a plain Stable Diffusion one, `motion_adapter` is put on it.
    """

    def part(load: Callable[..., Any], subfolder: str, **options: Any) -> Any:
        return _load(load, model, subfolder=subfolder, **options)

    if part(UNetMotionModel.load_config, "unet")["_class_name"] == "UNetMotionModel":
        unet = part(UNetMotionModel.from_pretrained, "unet", torch_dtype=dtype)
    elif motion_adapter is None:
        raise UserError(
            f"The UNet of '{model}' has no motion modules. Name a motion adapter "
            "(--set backbone.motion_adapter=...)."
        )
    else:
        adapter = _load(MotionAdapter.from_pretrained, motion_adapter, torch_dtype=dtype)
        spatial = part(UNet2DConditionModel.from_pretrained, "unet", torch_dtype=dtype)
        unet = UNetMotionModel.from_unet2d(spatial, adapter).to(dtype)
    return AnimateDiffModel(
        unet=unet,
        vae=part(AutoencoderKL.from_pretrained, "vae", torch_dtype=dtype),
        text_encoder=part(CLIPTextModel.from_pretrained, "text_encoder", dtype=dtype),
        tokenizer=part(CLIPTokenizer.from_pretrained, "tokenizer"),
        scheduler=part(DDIMScheduler.from_pretrained, "scheduler"),
        device=device,
        shape=shape,
        sampling=sampling,
    )


def _load(load: Callable[..., Any], source: str | Path, **options: Any) -> Any:
    try:
        with warnings.catch_warnings():
            # diffusers gives the hub's client an argument that it has no use for any more.
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            return load(str(source), **options)
    except (OSError, ValueError) as error:
        where = f"{options['subfolder']} of " if "subfolder" in options else ""
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"Cannot load the {where}'{source}': {reason} Name a folder or hub id in diffusers' "
            "layout (--set backbone.model=..., backbone.motion_adapter=...)."
        ) from error


@final
class AnimateDiffModel(VideoModel):
    """A loaded AnimateDiff model. Levels are timesteps of the training schedule."""

    def __init__(
        self,
        *,
        unet: UNetMotionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
        device: torch.device,
        shape: VideoShape,
        sampling: Sampling,
    ) -> None:
        self.denoiser: nn.Module = _resettled(unet.to(device)).eval().requires_grad_(False)
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.text_encoder = text_encoder.to(device).eval().requires_grad_(False)
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.device, self.shape, self.sampling = device, shape, sampling
        self.identity = hash_weights(self.denoiser, self.vae, self.text_encoder)
        self._alphas = scheduler.alphas_cumprod.to(device)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """`(c, f, h, w)`: every frame is encoded alone."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = self.shape.height // factor, self.shape.width // factor
        return self.vae.config.latent_channels, self.shape.frames, height, width

    @torch.no_grad()
    def encode_videos(self, videos: Videos) -> Latents:
        """Frame by frame, by the posterior's mean, times the VAE's scaling factor."""
        frames = (2 * videos.to(self.device, self.vae.dtype) - 1).transpose(1, 2).flatten(0, 1)
        latents = torch.cat(
            [self.vae.encode(part).latent_dist.mean for part in frames.split(_FRAMES_AT_ONCE)]
        )
        scaled = latents * self.vae.config.scaling_factor
        return scaled.unflatten(0, (len(videos), -1)).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode_videos(self, latents: Latents) -> Videos:
        """Frame by frame, back to [0, 1]."""
        frames = (latents / self.vae.config.scaling_factor).transpose(1, 2).flatten(0, 1)
        parts = frames.to(self.vae.dtype).split(_FRAMES_AT_ONCE)
        decoded = torch.cat([self.vae.decode(part).sample for part in parts])
        pixels = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return pixels.unflatten(0, (len(latents), -1)).transpose(1, 2)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Context:
        """The text encoder's last hidden states, `[b, tokens, channels]`."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        hidden = self.text_encoder(tokens["input_ids"].to(self.device)).last_hidden_state
        return {"prompt_embeds": hidden}

    def sample_levels(self, n: int, generator: Generator) -> PerPair:
        """Uniform timesteps `t ~ U{0..T-1}`."""
        steps = self.scheduler.config.num_train_timesteps
        return torch.randint(steps, (n,), generator=generator).float()

    def add_noise(self, clean: Latents, noise: Latents, level: PerPair) -> Latents:
        """`sqrt(abar) clean + sqrt(1 - abar) noise`."""
        alpha = self._alpha(level, clean)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def target(self, clean: Latents, noise: Latents, level: PerPair) -> Latents:
        """Epsilon or v, as the scheduler's configuration says."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            alpha = self._alpha(level, clean)
            return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        raise UserError(f"A scheduler that predicts '{kind}' cannot be trained; use epsilon or v.")

    def _alpha(self, level: PerPair, like: Tensor) -> Tensor:
        alpha = self._alphas[level.to(self.device).long()]
        return alpha.view(-1, *(1,) * (like.ndim - 1)).to(like.dtype)

    def predict(
        self, denoiser: nn.Module, noisy: Latents, level: PerPair, context: Context
    ) -> Latents:
        """One forward pass; every frame sees the same text."""
        text = context["prompt_embeds"].repeat_interleave(noisy.shape[2], dim=0)
        prediction: Latents = denoiser(noisy, level.to(noisy.device), text, return_dict=False)[0]
        return prediction

    @torch.no_grad()
    def sample(
        self,
        context: Context,
        noise: Latents,
        *,
        denoiser: nn.Module | None = None,
        clean: Latents | None = None,
        level: float = 1.0,
        region: Region | None = None,
        per_frame: bool = False,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Latents:
        """DDIM (Song et al. 2021, eta 0) with classifier-free guidance."""
        if per_frame:
            return self._sample_per_frame(
                context, noise, denoiser, clean, level, region, steps, guidance
            )
        denoiser = self.denoiser if denoiser is None else denoiser
        steps = self.sampling.steps if steps is None else steps
        guidance = self.sampling.guidance if guidance is None else guidance
        noise = noise.to(self.device)
        self.scheduler.set_timesteps(steps)
        # The share of the schedule that is run: round(alpha N) of N steps (LocalDPO, DenseDPO).
        times = self.scheduler.timesteps[steps - max(1, round(level * steps)) :]
        start = times[:1].float().expand(len(noise))
        latents = noise if clean is None else self.add_noise(clean, noise, start)
        empty = self.encode_prompts([""] * len(noise))["prompt_embeds"]
        text = torch.cat([empty, context["prompt_embeds"].to(self.device)])
        for time in times:
            levels = time.float().expand(len(noise))
            if region is not None and clean is not None:
                latents = torch.where(region > 0, latents, self.add_noise(clean, noise, levels))
            both = self.predict(
                denoiser, latents.repeat(2, 1, 1, 1, 1), levels.repeat(2), {"prompt_embeds": text}
            )
            without, given = both.chunk(2)
            prediction = without + guidance * (given - without)
            latents = self.scheduler.step(prediction, time, latents).prev_sample
        if region is not None and clean is not None:
            # LocalDPO's Eq. 3 at t = 0: outside the region, the winner's latents to the bit.
            latents = torch.where(region > 0, latents, clean)
        return latents

    def _sample_per_frame(
        self,
        context: Context,
        noise: Latents,
        denoiser: nn.Module | None,
        clean: Latents | None,
        level: float,
        region: Region | None,
        steps: int | None,
        guidance: float | None,
    ) -> Latents:
        def alone(video: Tensor | None) -> Tensor | None:
            return None if video is None else video.transpose(1, 2).flatten(0, 1).unsqueeze(2)

        frames = noise.shape[2]
        repeated = {name: value.repeat_interleave(frames, dim=0) for name, value in context.items()}
        drawn = self.sample(
            repeated,
            noise.transpose(1, 2).flatten(0, 1).unsqueeze(2),
            denoiser=denoiser,
            clean=alone(clean),
            level=level,
            region=alone(region),
            steps=steps,
            guidance=guidance,
        )
        return drawn.squeeze(2).unflatten(0, (-1, frames)).transpose(1, 2).contiguous()

    def latent_frames(self, segment: slice) -> slice:
        """The same frames: this VAE has no temporal stride."""
        return segment

    def lora_targets(self) -> list[str]:
        """The attention projections of the motion modules, and nothing else."""
        return [name for name, _ in self.denoiser.named_modules() if _ATTENTION.match(name)]


def _resettled(network: nn.Module) -> nn.Module:
    """The same weights in memory of their own.

    Loaded ones lie wherever their file has them. Kernels round differently by that, and a copy of
    the network would not equal it to the bit.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone()
    return network


def hash_weights(*networks: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of all weights, in 16 hex digits."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
