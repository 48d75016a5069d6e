"""A small model whose latents are strided in time, to try strategies on besides `tiny`.

What holds for `tiny` may fail here: a latent frame covers four pixel frames but for the first,
timesteps are shares of flow matching, and the transformer has rotary positions. Its weights are
random, so its videos show nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from dpo_video.strategies import Sampling, VideoModel
from dpo_video.types import Context, Latents, PerPair, Region, Videos, VideoShape

STRIDE, CELL, WIDTH, HEADS = 4, 8, 16, 2
CHANNELS = 4


class StridedModel(VideoModel):
    """A causal VAE with temporal stride 4 and a transformer of flow matching, on the CPU."""

    def __init__(self) -> None:
        """Draw the weights."""
        self.shape = VideoShape(frames=2 * STRIDE + 1, height=16, width=24, fps=8.0)
        self.sampling = Sampling(num_inference_steps=4, guidance_scale=1.0)
        self.device = torch.device("cpu")
        self.identity = "strided model of dpo_video.testing"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.denoiser = _Denoiser().eval().requires_grad_(False)
            self._mix = torch.linalg.qr(torch.randn(3, 3))[0]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Four channels, three frames, two by three cells."""
        shape = self.shape
        frames = 1 + (shape.frames - 1) // STRIDE
        return CHANNELS, frames, shape.height // CELL, shape.width // CELL

    def encode_videos(self, videos: Videos) -> Latents:
        """Means of the cells of each latent frame, and their means over the colours."""
        first = videos[:, :, :1].repeat(1, 1, STRIDE - 1, 1, 1)
        cells = F.avg_pool3d(torch.cat([first, videos], dim=2), (STRIDE, CELL, CELL))
        mixed = torch.einsum("dc,bcfhw->bdfhw", self._mix, 2 * cells - 1)
        return torch.cat([mixed, mixed.mean(dim=1, keepdim=True)], dim=1)

    def decode_videos(self, latents: Latents) -> Videos:
        """The colours of the cells."""
        cells = torch.einsum("dc,bdfhw->bcfhw", self._mix, latents[:, :3])
        pixels = cells.repeat_interleave(CELL, dim=3).repeat_interleave(CELL, dim=4)
        frames = pixels.repeat_interleave(STRIDE, dim=2)[:, :, STRIDE - 1 :]
        return ((frames + 1) / 2).clamp(0, 1)

    def encode_prompts(self, prompts: Sequence[str]) -> Context:
        """Two tokens of a prompt's bytes, and whether they count."""
        rows = torch.zeros(len(prompts), 2, WIDTH)
        for row, prompt in zip(rows, prompts, strict=True):
            for place, byte in enumerate(prompt.encode()):
                row[place % 2, byte % WIDTH] += 0.1
        return {"text": rows, "mask": torch.ones(len(prompts), 2)}

    def sample_timesteps(self, n: int, generator: Generator) -> PerPair:
        """Logit-normal."""
        return torch.randn(n, generator=generator).sigmoid()

    def add_noise(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """`(1 - t) clean + t noise`."""
        share = timestep.to(clean)[:, None, None, None, None]
        return (1 - share) * clean + share * noise

    def target(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """The velocity."""
        return noise - clean

    def predict(
        self, denoiser: nn.Module, noisy: Latents, timestep: PerPair, context: Context
    ) -> Latents:
        """Prediction of the velocity."""
        velocity: Latents = denoiser(noisy, timestep, context["text"], context["mask"])
        return velocity

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
        negative_prompt: str | None = None,
        dynamic_guidance: bool | None = None,
    ) -> Latents:
        """Euler's method."""
        if per_frame:
            frames = range(noise.shape[2])
            parts = [slice(frame, frame + 1) for frame in frames]
            return torch.cat(
                [
                    self.sample(
                        context, noise[:, :, part], denoiser=denoiser,
                        clean=None if clean is None else clean[:, :, part], strength=strength,
                        num_inference_steps=num_inference_steps,
                    )
                    for part in parts
                ],
                dim=2,
            )  # fmt: skip
        steps = num_inference_steps or self.sampling.num_inference_steps
        times = torch.linspace(1.0 if clean is None else strength, 0, steps + 1)
        latents = noise
        if clean is not None:
            latents = self.add_noise(clean, noise, times[:1].expand(len(noise)))
        for now, then in pairwise(times):
            velocity = self.predict(
                denoiser or self.denoiser, latents, now.expand(len(noise)), context
            )
            latents = latents + (then - now) * velocity
            if clean is not None and region is not None:
                outside = self.add_noise(clean, noise, then.expand(len(noise)))
                latents = torch.where(region > 0, latents, outside)
        return latents

    def latent_frames(self, segment: slice) -> slice:
        """Latent frame 0 is pixel frame 0, and k covers the frames 4k - 3 to 4k."""
        start, stop, _ = segment.indices(self.shape.frames)
        return slice(-(-start // STRIDE), 1 + (stop - 1 + STRIDE - 1) // STRIDE)

    def lora_targets(self) -> list[str]:
        """The attention's projections."""
        return ["to_q", "to_k", "to_v", "to_out"]

    def release(self) -> None:
        """There is nothing to free."""


class _Denoiser(nn.Module):
    """One block of attention over all cells of all frames, with rotary positions in time."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(
        self,
        latents: Latents,
        time: PerPair,
        text: Float[Tensor, "b tokens width"],
        mask: Float[Tensor, "b tokens"],
    ) -> Latents:
        _, _, frames, height, width = latents.shape
        cells = self.proj_in(latents.flatten(2).transpose(1, 2))
        hidden = torch.cat([cells + time[:, None, None], text * mask[:, :, None]], dim=1)
        places = torch.arange(frames).repeat_interleave(height * width)
        places = torch.cat([places, torch.zeros(text.shape[1], dtype=places.dtype)])
        query, key, value = (
            each(hidden).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for each in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(_turned(query, places), _turned(key, places), value)
        out = self.to_out(mixed.transpose(1, 2).flatten(2))[:, : cells.shape[1]]
        velocity: Latents = (
            self.proj_out(cells + out).transpose(1, 2).unflatten(2, (frames, height, width))
        )
        return velocity


def _turned(
    heads: Float[Tensor, "b n tokens width"], places: Tensor
) -> Float[Tensor, "b n tokens width"]:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""
    first, second = heads.chunk(2, dim=-1)
    angles = places[:, None] / 100.0 ** torch.linspace(0, 1, first.shape[-1])
    cos, sin = angles.cos().to(heads), angles.sin().to(heads)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
