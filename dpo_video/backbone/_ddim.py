"""Models that are trained on a discrete diffusion schedule and sampled by DDIM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dpo_video.backbone._pretrained import PretrainedModel, refuse_dynamic
from dpo_video.diffusion.pretrained import Checkpoint
from dpo_video.diffusion.sampling import Schedule, denoise, first_step
from dpo_video.errors import UserError
from dpo_video.types import Context, Latents, PerPair, Region


class DDIMModel(PretrainedModel):
    """A model with timesteps `t` of a schedule `abar_t` (Ho et al. 2020).

    Args:
        checkpoint: Its source and placement.
        scheduler: The family's DDIM scheduler of diffusers, with `alphas_cumprod` of training.
        parts: Further arguments of `PretrainedModel`.
    """

    def __init__(self, checkpoint: Checkpoint, *, scheduler: Any, **parts: Any) -> None:
        super().__init__(checkpoint, **parts)
        self.scheduler = scheduler
        self._alphas = scheduler.alphas_cumprod.to(self.device, torch.float32)

    @property
    def _factor(self) -> int:
        """Pixels per latent, along a side."""
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
        raise UserError(
            f"The scheduler's prediction type '{kind}' is not supported. Use a checkpoint with "
            "epsilon or v_prediction."
        )

    def strength_at(self, sigma: float, num_inference_steps: int | None = None) -> float:
        """Share of the steps with `sqrt(1 - abar) / (sqrt(abar) + sqrt(1 - abar)) <= sigma`.

        At least one step.
        """
        steps = num_inference_steps or self.sampling.num_inference_steps
        alphas = self._alphas[self._schedule(steps).timesteps.long().to(self.device)]
        noise = (1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())
        return max(1, int((noise <= sigma).sum())) / steps

    def _alpha(self, timestep: PerPair, like: Tensor) -> Tensor:
        alpha = self._alphas[timestep.to(self.device).long()]
        return alpha.view(-1, *(1,) * (like.ndim - 1)).to(like.dtype)

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
        """DDIM (Song et al. 2021, eta 0)."""
        scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        scales = self._guidance_scales(scale, steps, dynamic_guidance)
        guided = any(scale != 1 for scale in scales)
        return denoise(
            self,
            denoiser,
            self._schedule(steps),
            context,
            noise,
            empty=self._negative_context(negative_prompt, len(noise)) if guided else None,
            guidance_scale=scales,
            first=first_step(strength, steps),
            clean=clean,
            region=region,
        )

    def _guidance_scales(self, scale: float, steps: int, dynamic: bool | None) -> Sequence[float]:
        """The guidance scale of each step."""
        refuse_dynamic(dynamic)
        return [scale] * steps

    def _schedule(self, steps: int) -> Schedule:
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        # The stride of the scheduler's own step().
        stride = self.scheduler.config.num_train_timesteps // steps

        def step(prediction: Latents, index: int, latents: Latents) -> Latents:
            return self.scheduler.step(prediction, timesteps[index], latents).prev_sample

        return Schedule(
            timesteps=timesteps.float(),
            next_timesteps=(timesteps - stride).clamp(min=0).float(),
            step=step,
        )
