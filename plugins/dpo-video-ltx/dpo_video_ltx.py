"""The backbone `ltx` for dpo-video: LTX-Video, by the networks of diffusers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice, pairwise, product
from typing import Any, ClassVar, final

import numpy as np
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
)
from torch import Generator, Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from dpo_video.plugin import (
    Backbone,
    Clip,
    Context,
    Field,
    Latents,
    PerPair,
    Placement,
    Region,
    Sampling,
    UserError,
    VideoModel,
    Videos,
    VideoShape,
)

TOKENS = 128  # of a prompt
WHO = (
    "A dog",
    "A child in a red coat",
    "A cyclist",
    "An old sailor",
    "A flock of birds",
    "A train",
)
WHAT = ("crosses a bridge", "moves through tall grass", "passes a market", "appears out of the fog")
WHEN = ("at dawn", "in heavy rain", "on a windy day", "under street lamps")


@final
class LTX(Backbone):
    """LTX-Video (HaCohen et al. 2024, arXiv 2501.00103): flow matching on small latents.

    A latent covers 8 frames of 32x32 pixels. Checkpoints of version 0.9.0; the decoders of later
    ones also remove noise, which is not supported.
    """

    guards: ClassVar[tuple[str, ...]] = ("sharpness", "contrast", "new_frames")
    training: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-5, "mixed_precision": "bf16"}

    model: str = "Lightricks/LTX-Video"
    """Hub id, or a folder that diffusers has saved."""
    frames: int = Field(default=49, ge=9)
    """Frames of a video: a multiple of 8, and one."""
    height: int = Field(default=480, ge=32)
    """Height in pixels, a multiple of 32."""
    width: int = Field(default=704, ge=32)
    """Width in pixels, a multiple of 32."""
    fps: float = Field(default=24.0, gt=0)
    """Frames a second, which the model is told."""
    negative_prompt: str = "worst quality, inconsistent motion, blurry, jittery, distorted"
    """Negative prompt of classifier-free guidance."""

    def load(self, placement: Placement) -> VideoModel:
        """Load the denoiser; the VAE and the text encoder follow when they are used.

        Raises:
            UserError: for a size that the VAE cannot encode.
        """
        return LTXModel(self, placement)

    def clips(self, seed: int) -> Iterator[Clip] | None:
        """It has no clips of its own."""
        return None

    def prompts(self, n: int) -> list[str]:
        """Sentences in which every part appears about equally often."""
        return list(islice(cycle(map(" ".join, product(WHO, WHAT, WHEN))), n))


@final
class LTXModel(VideoModel):
    """A loaded model."""

    def __init__(self, options: LTX, placement: Placement) -> None:
        self._options, self._placement = options, placement
        self.device, self._dtype = placement.device, placement.dtype
        self.shape = VideoShape(
            frames=options.frames, height=options.height, width=options.width, fps=options.fps
        )
        self.sampling = Sampling(num_inference_steps=50, guidance_scale=3.0)
        self.denoiser = self._network(LTXVideoTransformer3DModel, "transformer", "cpu")
        self.identity = "on meta" if placement.on_meta else _hash(self.denoiser)
        if placement.pack is not None:  # it may quantize the weights, or keep them on the host
            placement.pack(self.denoiser)
        if not placement.denoiser_on_host and not placement.on_meta:
            self.denoiser.to(self.device)
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            options.model, subfolder="scheduler"
        )
        config = AutoencoderKLLTXVideo.load_config(options.model, subfolder="vae")
        if config.get("timestep_conditioning"):
            raise UserError(
                f"'{options.model}' has a decoder that removes noise, which the backbone ltx does "
                "not support. Name a checkpoint of version 0.9.0."
            )
        doubled = sum(config["spatio_temporal_scaling"])
        self._stride = config["patch_size_t"] * 2**doubled
        self._cell = config["patch_size"] * 2**doubled
        if (options.frames - 1) % self._stride or options.height % self._cell or (
            options.width % self._cell
        ):  # fmt: skip
            raise UserError(
                f"ltx cannot encode {options.frames} frames of {options.height}x{options.width}. "
                f"Set backbone.frames to a multiple of {self._stride} and one, and height and "
                f"width to multiples of {self._cell}."
            )
        self._channels = int(config["latent_channels"])
        self._vae: Any = None
        self._text: tuple[Any, Any] | None = None
        self._negative: dict[str, Context] = {}

    def _network(self, kind: Any, part: str, device: torch.device | str) -> Any:
        """A network of the checkpoint, frozen and in evaluation mode."""
        source = self._options.model
        if self._placement.on_meta:  # shapes alone
            with torch.device("meta"):
                network = kind.from_config(kind.load_config(source, subfolder=part))
            network.to(self._dtype)
        else:
            network = kind.from_pretrained(source, subfolder=part, torch_dtype=self._dtype)
            network.to(device)
        return network.eval().requires_grad_(False)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """`(c, f, h, w)` of one video."""
        shape = self.shape
        frames = 1 + (shape.frames - 1) // self._stride
        return self._channels, frames, shape.height // self._cell, shape.width // self._cell

    # --- the VAE and the text encoder ---

    def _loaded_vae(self) -> Any:
        if self._vae is None:
            self._vae = self._network(AutoencoderKLLTXVideo, "vae", self.device)
        return self._vae

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Mean of the latents, and the factor that makes their deviation 1."""
        vae = self._loaded_vae()
        mean, std = (
            each.view(1, -1, 1, 1, 1).float() for each in (vae.latents_mean, vae.latents_std)
        )
        return mean, vae.config.scaling_factor / std

    @torch.no_grad()
    def encode_videos(self, videos: Videos) -> Latents:
        """The mean of the VAE's posterior, scaled."""
        vae, (mean, factor) = self._loaded_vae(), self._scale()
        pixels = 2 * videos.to(self.device, self._dtype) - 1
        return (vae.encode(pixels).latent_dist.mean.float() - mean) * factor

    @torch.no_grad()
    def decode_videos(self, latents: Latents) -> Videos:
        """Pixels in [0, 1]."""
        vae, (mean, factor) = self._loaded_vae(), self._scale()
        unscaled = latents.to(self.device).float() / factor + mean
        pixels = vae.decode(unscaled.to(self._dtype), None, return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Context:
        """Encodings of T5, and which of their tokens count."""
        if self._text is None:
            source = self._options.model
            encoder = T5EncoderModel.from_pretrained(source, subfolder="text_encoder")
            encoder = encoder.to(self.device, self._dtype).eval().requires_grad_(False)
            self._text = AutoTokenizer.from_pretrained(source, subfolder="tokenizer"), encoder
        tokenizer, encoder = self._text
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=TOKENS, truncation=True,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        return {
            "prompt_embeds": encoder(tokens.input_ids)[0],
            "prompt_mask": tokens.attention_mask.to(self._dtype),
        }

    def negative_context(self, prompt: str | None = None) -> Context:
        """Encode a negative prompt now, so that `sample` needs no text encoder."""
        text = self._options.negative_prompt if prompt is None else prompt
        if text not in self._negative:
            encoded = self.encode_prompts([text])
            self._negative[text] = {name: value.cpu() for name, value in encoded.items()}
        return self._negative[text]

    def keep_negative(self, context: Context) -> None:
        """Keep what `negative_context` returned earlier."""
        self._negative[self._options.negative_prompt] = context

    def release(self) -> None:
        """Free the VAE and the text encoder."""
        self._vae, self._text = None, None

    # --- diffusion: timesteps are 1000 times the share of the noise ---

    def _shifted(self, share: Tensor) -> Tensor:
        """The share of noise at a share of the schedule, more for longer videos."""
        strength = math.exp(self._shift())
        return strength / (strength + (1 / share - 1))

    def _shift(self) -> float:
        """The shift of the noise levels, linear in the number of latent cells."""
        config, (_, *cells) = self._scheduler.config, self.latent_shape
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(low + (high - low) * (math.prod(cells) - few) / (many - few))

    def _sigmas(self, steps: int | None) -> Tensor:
        """Shares of noise of sampling, from 1 to 0."""
        steps = steps or self.sampling.num_inference_steps
        self._scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=self._shift())
        sigmas: Tensor = self._scheduler.sigmas
        return sigmas

    def sample_timesteps(self, n: int, generator: Generator) -> PerPair:
        """Logit-normal, shifted as in sampling."""
        return 1000 * self._shifted(torch.randn(n, generator=generator).sigmoid())

    def add_noise(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """`(1 - s) clean + s noise`, one `s` per video."""
        share = timestep.to(clean)[:, None, None, None, None] / 1000
        return (1 - share) * clean + share * noise

    def target(self, clean: Latents, noise: Latents, timestep: PerPair) -> Latents:
        """The velocity."""
        return noise - clean

    def predict(
        self, denoiser: nn.Module, noisy: Latents, timestep: PerPair, context: Context
    ) -> Latents:
        """Prediction of the velocity."""
        _, _, frames, height, width = noisy.shape
        velocity: Tensor = denoiser(
            hidden_states=noisy.to(self._dtype).flatten(2).transpose(1, 2),
            encoder_hidden_states=context["prompt_embeds"].to(noisy.device),
            timestep=timestep.to(noisy.device),
            encoder_attention_mask=context["prompt_mask"].to(noisy.device),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self._stride / self.shape.fps, self._cell, self._cell),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).unflatten(2, (frames, height, width))

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
        """Euler's method with classifier-free guidance."""
        if per_frame:  # every latent frame as a video of its own
            frames = [
                self.sample(
                    context, noise[:, :, [frame]], denoiser=denoiser,
                    clean=None if clean is None else clean[:, :, [frame]], strength=strength,
                    num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                    negative_prompt=negative_prompt,
                )
                for frame in range(noise.shape[2])
            ]  # fmt: skip
            return torch.cat(frames, dim=2)
        scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        network, count = denoiser or self.denoiser, len(noise)
        context = {name: value.to(self.device) for name, value in context.items()}
        if scale != 1:
            negative = self.negative_context(negative_prompt)
            context = {
                name: torch.cat([negative[name].to(value).expand_as(value), value])
                for name, value in context.items()
            }
        sigmas = self._sigmas(num_inference_steps).to(self.device)
        latents = noise = noise.to(self.device).float()
        if clean is not None:
            clean = clean.to(self.device).float()
            kept = max(1, round(strength * (len(sigmas) - 1)))
            sigmas = sigmas[-1 - kept :]
            latents = self.add_noise(clean, noise, 1000 * sigmas[:1].expand(count))
        for now, then in pairwise(sigmas):
            both = latents if scale == 1 else latents.repeat(2, 1, 1, 1, 1)
            velocity = self.predict(network, both, 1000 * now.expand(len(both)), context).float()
            if scale != 1:
                without, given = velocity.chunk(2)
                velocity = without + scale * (given - without)
            latents = latents + (then - now) * velocity
            if clean is not None and region is not None:  # what lies outside is given
                outside = self.add_noise(clean, noise, 1000 * then.expand(count))
                latents = torch.where(region.to(latents) > 0, latents, outside)
        return latents

    def strength_at(self, sigma: float, num_inference_steps: int | None = None) -> float:
        """The share of the sampling steps that starts from no more noise than `sigma`."""
        sigmas = self._sigmas(num_inference_steps)[:-1]
        return max(1, int((sigmas <= sigma).sum())) / len(sigmas)

    def latent_frames(self, segment: slice) -> slice:
        """Latent frame 0 is frame 0; each further one covers the next 8."""
        start, stop, _ = segment.indices(self.shape.frames)
        return slice(-(-start // self._stride), 1 - (-(stop - 1) // self._stride))

    def lora_targets(self) -> list[str]:
        """The attention's projections."""
        ends = (".to_q", ".to_k", ".to_v", ".to_out.0")
        return [name for name, _ in self.denoiser.named_modules() if name.endswith(ends)]

    def prompt_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of an encoded prompt."""
        width = int(self.denoiser.config.caption_channels)
        return {"prompt_embeds": (TOKENS, width), "prompt_mask": (TOKENS,)}


def _hash(network: nn.Module) -> str:
    """A hash of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
