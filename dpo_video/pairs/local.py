"""Region-level pairs: a real clip and the same clip, partly repainted."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import Field
from torch import Generator

from dpo_video.errors import UserError
from dpo_video.pairs._masks import RegionOptions, draw_region
from dpo_video.strategies import Labeler, PairBuilder, VideoModel
from dpo_video.types import Clip, Pair


@final
class Local(PairBuilder):
    """LocalDPO: repaints moving regions of a real clip, which is the chosen video.

    Huang et al. 2026, arXiv 2601.04068: one noise and one sampling pass per pair, no critic and no
    annotator. Outside the region both videos' latents are equal to the bit.
    """

    asks_labeler: ClassVar[bool] = False

    alphas: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.75, 0.80, 0.85, 0.90)
    """Shares of the noise schedule, one drawn per pair (the authors' code goes to 0.95)."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Steps of the full schedule, of which the share alpha is run; the backbone's default if unset
    (the paper uses 50)."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Classifier-free guidance; the backbone's default if unset (the paper uses 6.0)."""
    prompt_prefix: str = ""
    """Put before the caption that the region is repainted by; the pair keeps the caption alone (the
    authors use "highly detailed, perfect without deformations, ultra HD, ")."""
    negative_prompt: str | None = None
    """Negative prompt of the repainting; the backbone's own if unset (the authors use "blurring,
    dirty, messy, low quality, cartoon, drawing, anime")."""
    dynamic_guidance: bool | None = None
    """Change the guidance scale from step to step; the backbone's own if unset (the authors do on
    CogVideoX, the only family that has it)."""
    mask: RegionOptions = RegionOptions()
    """Options of the regions."""

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Repaint a region of the clip."""
        if clip.video is None:
            raise UserError("Pairs of kind 'local' need real videos. Name them with --clips DIR.")
        _, frames, height, width = model.latent_shape
        region = draw_region(
            (frames, height, width),
            (model.shape.height, model.shape.width),
            generator,
            self.mask,
        )
        alpha = self.alphas[int(torch.randint(len(self.alphas), (), generator=generator))]
        noise = torch.randn(model.latent_shape, generator=generator)
        chosen = model.encode_videos(clip.video[None])
        guidance: dict[str, Any] = {
            "negative_prompt": self.negative_prompt,
            "dynamic_guidance": self.dynamic_guidance,
        }
        rejected = model.sample(
            model.encode_prompts([self.prompt_prefix + clip.caption]),
            noise[None].to(chosen),
            clean=chosen,
            strength=alpha,
            region=region[None].to(chosen),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            **{name: value for name, value in guidance.items() if value is not None},
        )
        return Pair(
            first=chosen[0].cpu(),
            second=rejected[0].cpu(),
            preference=torch.ones(frames),
            region=region,
            prompt=clip.caption,
            source=clip.name,
            strength=alpha,
        )
