"""What families share that are trained on a discrete diffusion schedule and sampled by DDIM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dpo_video.diffusion.pretrained import Lazy, free
from dpo_video.diffusion.sampling import Schedule, denoise, first_step
from dpo_video.errors import UserError
from dpo_video.strategies import VideoModel
from dpo_video.types import Context, Latents, PerPair, Region


class DDIMModel(VideoModel):
    """A model whose levels are timesteps `t` of a schedule `abar_t` (Ho et al. 2020).

    Args:
        scheduler: diffusers' DDIM of the family, with the training schedule's `alphas_cumprod`.
        vae: Loaded when it is first used.
        vae_config: Its configuration, filled up with defaults.
        text_encoder: Loaded when it is first used.
    """

    def __init__(
        self,
        *,
        scheduler: Any,
        vae: Lazy[Any],
        vae_config: Mapping[str, Any],
        text_encoder: Lazy[Any],
    ) -> None:
        self.scheduler = scheduler
        self._alphas = scheduler.alphas_cumprod.to(self.device, torch.float32)
        self._vae, self._vae_config, self._text_encoder = vae, vae_config, text_encoder
        self._empty: Context | None = None

    @property
    def vae(self) -> Any:
        """Loaded when it is first used."""
        return self._vae.get()

    @property
    def text_encoder(self) -> Any:
        """Loaded when it is first used."""
        return self._text_encoder.get()

    def release(self) -> None:
        """Free the VAE and the text encoder."""
        free(self._vae, self._text_encoder)

    @property
    def _factor(self) -> int:
        """Pixels to a side of a latent."""
        return int(2 ** (len(self._vae_config["block_out_channels"]) - 1))

    def sample_timesteps(self, n: int, generator: Generator) -> PerPair:
        """Uniform timesteps `t ~ U{0..T-1}`."""
        count = self.scheduler.config.num_train_timesteps
        return torch.randint(count, (n,), generator=generator).float()

    def add_noise(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """`sqrt(abar) clean + sqrt(1 - abar) noise`."""
        alpha = self._alpha(timestep, clean)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def target(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """Epsilon, or `v = sqrt(abar) noise - sqrt(1 - abar) clean` (Salimans and Ho 2022)."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            alpha = self._alpha(timestep, clean)
            return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        raise UserError(f"A scheduler that predicts '{kind}' cannot be trained; use epsilon or v.")

    def _alpha(self, timestep: PerPair, like: Tensor) -> Tensor:
        alpha = self._alphas[timestep.to(self.device).long()]
        return alpha.view(-1, *(1,) * (like.ndim - 1)).to(like.dtype)

    def _denoise(
        self,
        context: Context,
        noise: Latents,
        *,
        denoiser: nn.Module | None,
        clean: Latents | None,
        strength: float,
        region: Region | None,
        scales: Sequence[float],
    ) -> Latents:
        """DDIM with one scale of guidance a step."""
        num_inference_steps = len(scales)
        guided = any(scale != 1 for scale in scales)
        return denoise(
            self,
            self.denoiser if denoiser is None else denoiser,
            self._schedule(num_inference_steps),
            context,
            noise,
            empty=self._empty_context(len(noise)) if guided else None,
            guidance_scale=scales,
            first=first_step(strength, num_inference_steps),
            clean=clean,
            region=region,
        )

    def _schedule(self, num_inference_steps: int) -> Schedule:
        self.scheduler.set_timesteps(num_inference_steps)
        times = self.scheduler.timesteps
        ahead = (
            self.scheduler.config.num_train_timesteps // num_inference_steps
        )  # as its step() has it

        def step(prediction: Latents, index: int, latents: Latents) -> Latents:
            return self.scheduler.step(prediction, times[index], latents).prev_sample

        return Schedule(
            timesteps=times.float(), next_timesteps=(times - ahead).clamp(min=0).float(), step=step
        )

    def _empty_context(self, count: int) -> Context:
        if self._empty is None:
            self._empty = self.encode_prompts([""])
        return {name: value.expand(count, -1, -1) for name, value in self._empty.items()}
