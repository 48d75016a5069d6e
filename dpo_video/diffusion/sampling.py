"""The sampling loop of all families: guidance, img2img, inpainting of a region, single frames.

A family provides its `Schedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_video.errors import UserError
from dpo_video.types import Context, Latents, PerPair, Region, Videos


def check_finite(latents: Latents, videos: Videos, prompts: Sequence[str]) -> None:
    """Check that samples are finite.

    Raises:
        UserError: if not; it names the first such prompt.
    """
    for prompt, latent, video in zip(prompts, latents, videos, strict=True):
        if not (latent.isfinite().all() and video.isfinite().all()):
            raise UserError(
                f"The sample for '{prompt}' is not finite. Sample in another precision "
                '(--set train.mixed_precision="bf16" or "no"). If only a trained model does so, '
                "its training has diverged: use an earlier checkpoint, or lower "
                "train.learning_rate."
            )


@runtime_checkable
class Denoises(Protocol):
    """What `denoise` needs of a model; see `VideoModel`, which has it."""

    device: torch.device

    def add_noise(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """Forward process at `timestep`."""

    def predict(
        self, denoiser: nn.Module, noisy: Latents, timestep: PerPair, context: Context
    ) -> Latents:
        """Prediction of a denoiser."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All sampling steps, from noise to a video."""

    timesteps: Float[Tensor, " n"]
    """Input of the denoiser at each step, in the family's unit (see `VideoModel.add_noise`)."""
    next_timesteps: Float[Tensor, " n"]
    """Timestep of the latents after each step. The last one is not used: no noise is left then."""
    step: Callable[[Latents, int, Latents], Latents]
    """`(prediction, index of the step, latents)` to the latents after the step."""
    exact_timesteps: Float[Tensor, " n"] | None = None
    """Timestep of the latents before each step, where `timesteps` are rounded."""


def first_step(strength: float, num_inference_steps: int) -> int:
    """Index of the first step: round(strength N) of N steps are run, and at least one.

    The rule of LocalDPO and DenseDPO (arXiv 2601.04068, 2506.03517).
    """
    return num_inference_steps - max(1, round(strength * num_inference_steps))


@torch.no_grad()
def denoise(
    model: Denoises,
    denoiser: nn.Module,
    schedule: Schedule,
    context: Context,
    noise: Latents,
    *,
    empty: Context | None,
    guidance_scale: Sequence[float],
    first: int = 0,
    clean: Latents | None = None,
    region: Region | None = None,
) -> Latents:
    """Run a schedule from its step `first` on.

    Args:
        model: Predicts and adds noise.
        denoiser: The network to run.
        schedule: The steps.
        context: Encoded prompts, one per video.
        noise: The only randomness. Latents keep its dtype, whatever the network's is.
        empty: Encoded negative prompts, one per video; None runs without guidance.
        guidance_scale: Scale of classifier-free guidance at each step (Ho and Salimans 2022).
        first: Index of the first step.
        clean: Noised to the timestep of the first step; None starts from the noise itself.
        region: With `clean`: 1 where it is regenerated. Everything else equals `clean` to the bit.
    """
    device, count = model.device, len(noise)
    noise = noise.to(device)
    clean = None if clean is None else clean.to(noise)
    context = {name: value.to(device) for name, value in context.items()}
    if empty is not None:
        context = {name: torch.cat([empty[name].to(value), value])
                   for name, value in context.items()}  # fmt: skip
    timesteps = schedule.timesteps.to(device)
    next_timesteps = schedule.next_timesteps.to(device)
    latents = noise
    if clean is not None:
        exact = timesteps if schedule.exact_timesteps is None else schedule.exact_timesteps
        latents = model.add_noise(clean, noise, exact[first].to(device).expand(count))
    for index in range(first, len(timesteps)):
        timestep = timesteps[index].expand(count)
        if empty is None:
            prediction = model.predict(denoiser, latents, timestep, context).to(noise.dtype)
        else:
            both = model.predict(
                denoiser, latents.repeat(2, 1, 1, 1, 1), timestep.repeat(2), context
            )
            without, given = both.to(noise.dtype).chunk(2)
            prediction = without + guidance_scale[index] * (given - without)
        latents = schedule.step(prediction, index, latents)
        if clean is not None and region is not None:
            # LocalDPO's Eq. 3. After the last step, `clean` to the bit outside the region.
            last = index + 1 == len(timesteps)
            outside = clean
            if not last:
                outside = model.add_noise(clean, noise, next_timesteps[index].expand(count))
            latents = torch.where(region.to(device) > 0, latents, outside)
    return latents


def frame_by_frame(
    sample: Callable[..., Latents],
    context: Context,
    noise: Latents,
    *,
    clean: Latents | None = None,
    region: Region | None = None,
    size: int = 1,
    **options: Any,
) -> Latents:
    """Call a family's `sample` with every `size` latent frames as a separate video."""

    def split(videos: Tensor | None) -> Tensor | None:
        if videos is None:
            return None
        parts = videos.unflatten(2, (-1, size)).transpose(1, 2)  # b n c s h w
        return parts.flatten(0, 1)

    count = noise.shape[2] // size
    repeated = {name: value.repeat_interleave(count, dim=0) for name, value in context.items()}
    drawn = sample(repeated, split(noise), clean=split(clean), region=split(region), **options)
    return drawn.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3).contiguous()
