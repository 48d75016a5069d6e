"""CogVideoX: a transformer over text and video tokens, on latents that a causal VAE makes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from dpo_video.backbone._ddim import DDIMModel
from dpo_video.backbone._prompts import diverse
from dpo_video.diffusion.pretrained import Checkpoint, Lazy, identity, place, place_denoiser
from dpo_video.diffusion.sampling import frame_by_frame
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

_ATTENTION = re.compile(r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)")
# The causal VAE makes a latent frame of the first frame and of every four after it. It decodes
# latent frames two at a time, and only with an odd number of them starts with a single frame.
_STRIDE = 4
_FRAMES = 2 * _STRIDE


@final
class CogVideoX(Backbone):
    """CogVideoX 2B, 5B and 1.5-5B, text to video (Yang et al. 2024, arXiv 2408.06072).

    Its published checkpoints need sentencepiece (pip install 'dpo-video[cogvideox]'). For 1.5-5B
    set frames 81, height 768, width 1360 and fps 16. `img2img` pairs treat every latent
    frame as a video of one frame (in 1.5-5B, every two: its smallest patch in time).
    """

    guards: ClassVar[tuple[str, ...]] = ("sharpness",)
    # LocalDPO's table (arXiv 2601.04068).
    training: ClassVar[Mapping[str, Any]] = {
        "rank": 64,
        "alpha": 128.0,
        "learning_rate": 1e-5,
        "betas": (0.9, 0.95),
        "weight_decay": 1e-3,
        "warmup_steps": 10,
    }

    model: str = "THUDM/CogVideoX-2b"
    """Hub id or folder, in diffusers' layout."""
    revision: str | None = None
    """Branch, tag or commit on the hub; its main branch when not set."""
    frames: int = Field(default=49, ge=_FRAMES + 1)
    """Frames of a video: 8k + 1."""
    height: int = Field(default=480, ge=16)
    """Pixels."""
    width: int = Field(default=720, ge=16)
    """Pixels."""
    fps: float = Field(default=8.0, gt=0)
    """Frames per second that clips are resampled to."""
    dynamic_guidance: bool = False
    """Change the guidance from step to step, as diffusers' pipeline does with use_dynamic_cfg."""
    tiling: bool = False
    """Encode and decode videos in tiles: less memory, slightly other pixels."""

    def load(self, placement: Placement) -> VideoModel:
        """Load the denoiser; a UserError if a part is missing or the shape does not fit it."""
        checkpoint = Checkpoint(source=self.model, revision=self.revision, placement=placement)
        described = checkpoint.config("transformer").get("_class_name")
        if described != CogVideoXTransformer3DModel.__name__:
            raise UserError(
                f"The transformer of '{self.model}' is a {described}, not CogVideoX's. Name a "
                "CogVideoX checkpoint (--set backbone.model=...), or another --backbone."
            )
        return CogVideoXModel(
            checkpoint,
            shape=VideoShape(
                frames=self.frames, height=self.height, width=self.width, fps=self.fps
            ),
            dynamic_guidance=self.dynamic_guidance,
            tiling=self.tiling,
        )

    def clips(self, seed: int) -> Iterator[Clip] | None:
        """This family has no clips of its own."""
        return None

    def prompts(self, n: int) -> list[str]:
        """Eight diverse prompts, cycled."""
        return diverse(n)


@final
class CogVideoXModel(DDIMModel):
    """A loaded CogVideoX. Levels are timesteps of the training schedule."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        shape: VideoShape,
        dynamic_guidance: bool = False,
        tiling: bool = False,
    ) -> None:
        placement = checkpoint.placement
        device, dtype = placement.device, placement.dtype
        self.device, self.dtype, self.shape = device, dtype, shape
        self._checkpoint = checkpoint
        self.sampling = Sampling(num_inference_steps=50, guidance_scale=6.0)
        self._config = checkpoint.full_config(CogVideoXTransformer3DModel, "transformer")
        self._vae_config = checkpoint.full_config(AutoencoderKLCogVideoX, "vae")
        self._dynamic = dynamic_guidance
        self._check(checkpoint)
        self.identity = identity(
            checkpoint.digest("transformer", "vae", "text_encoder", "scheduler"), dtype=dtype
        )
        scheduler = checkpoint.load(CogVideoXDDIMScheduler.from_pretrained, "scheduler")
        if scheduler.config.prediction_type != "v_prediction":
            raise UserError(
                f"The scheduler of '{checkpoint.source}' predicts "
                f"'{scheduler.config.prediction_type}', but CogVideoX is trained on "
                "v_prediction. Take the scheduler_config.json of the original checkpoint."
            )
        self.tokenizer = checkpoint.load(AutoTokenizer.from_pretrained, "tokenizer")
        self.denoiser: nn.Module = place_denoiser(
            checkpoint.load(
                CogVideoXTransformer3DModel.from_pretrained, "transformer", torch_dtype=dtype
            ),
            placement,
        )

        def load_vae() -> AutoencoderKLCogVideoX:
            vae = checkpoint.load(AutoencoderKLCogVideoX.from_pretrained, "vae", torch_dtype=dtype)
            if tiling:
                vae.enable_tiling()
            return place(vae, placement)

        def load_text_encoder() -> T5EncoderModel:
            text_encoder = checkpoint.load(
                T5EncoderModel.from_pretrained, "text_encoder", dtype=dtype
            )
            return place(text_encoder, placement)

        super().__init__(
            scheduler=scheduler,
            vae=Lazy(load_vae),
            vae_config=self._vae_config,
            text_encoder=Lazy(load_text_encoder),
        )

    def _check(self, checkpoint: Checkpoint) -> None:
        if self._config["in_channels"] != self._vae_config["latent_channels"]:
            raise UserError(
                f"'{checkpoint.source}' is an image-to-video model: it wants a picture as well. "
                "Name a text-to-video one (--set backbone.model=THUDM/CogVideoX-2b)."
            )
        if (self.shape.frames - 1) % _FRAMES:
            near = max(1, round((self.shape.frames - 1) / _FRAMES)) * _FRAMES + 1
            raise UserError(
                f"CogVideoX makes videos of 8k + 1 frames, not of {self.shape.frames}. Take "
                f"{near} (--set backbone.frames={near})."
            )
        multiple = self._factor * self._config["patch_size"]
        for name in ("height", "width"):
            pixels = getattr(self.shape, name)
            if pixels % multiple:
                near = max(1, round(pixels / multiple)) * multiple
                raise UserError(
                    f"CogVideoX makes videos whose {name} is a multiple of {multiple} pixels, not "
                    f"{pixels}. Take {near} (--set backbone.{name}={near})."
                )
            most = self._config[f"sample_{name}"] * self._factor
            if self._config["patch_size_t"] is not None and pixels > most:
                raise UserError(
                    f"This model knows positions up to a {name} of {most} pixels, not {pixels}. "
                    f"Lower it (--set backbone.{name}=...)."
                )

    @property
    def _padding(self) -> int:
        """Latent frames put before a video, so that 1.5's patches in time come out even."""
        frames = (self.shape.frames - 1) // _STRIDE + 1
        return -frames % (self._config["patch_size_t"] or 1)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """`(c, f, h, w)`, with the padding of 1.5 among the frames, as it is denoised."""
        return (
            self._vae_config["latent_channels"],
            (self.shape.frames - 1) // _STRIDE + 1 + self._padding,
            self.shape.height // self._factor,
            self.shape.width // self._factor,
        )

    @torch.no_grad()
    def encode_videos(self, videos: Videos) -> Latents:
        """By the posterior's mean, times the VAE's scaling factor.

        The first frame is repeated as padding, as CogVideoX's own training does. (The VAE's
        `invert_scale_latents` is about the picture of image-to-video models alone.)
        """
        pixels = 2 * videos.to(self.device, self.dtype) - 1
        # One at a time: at full size, activations of more do not fit.
        means = torch.cat([self.vae.encode(video).latent_dist.mean for video in pixels.split(1)])
        latents = means.float() * self._vae_config["scaling_factor"]
        return torch.cat([latents[:, :, :1]] * self._padding + [latents], dim=2)

    @torch.no_grad()
    def decode_videos(self, latents: Latents) -> Videos:
        """Without the padding, back to [0, 1]."""
        scaled = latents[:, :, self._padding :] / self._vae_config["scaling_factor"]
        parts = scaled.to(self.device, self.dtype).split(1)
        decoded = torch.cat([self.vae.decode(part).sample for part in parts])
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Context:
        """The text encoder's last hidden states, `[b, tokens, channels]`, padding included."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self._config["max_text_seq_length"],
            add_special_tokens=True,
            return_tensors="pt",
        )
        hidden = self.text_encoder(tokens["input_ids"].to(self.device)).last_hidden_state
        return {"prompt_embeds": hidden}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """One vector a token, as many as a prompt is filled up to."""
        tokens, width = self._config["max_text_seq_length"], self._config["text_embed_dim"]
        return {"prompt_embeds": (tokens, width)}

    def predict(
        self, denoiser: nn.Module, noisy: Latents, timestep: PerPair, context: Context
    ) -> Latents:
        """One forward pass; frames come before channels in there."""
        prediction: Latents = denoiser(
            hidden_states=noisy.to(self.dtype).transpose(1, 2),
            encoder_hidden_states=context["prompt_embeds"].to(self.dtype),
            timestep=timestep.to(noisy.device),
            image_rotary_emb=self._rotary(noisy),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2)

    def _rotary(self, noisy: Latents) -> tuple[Tensor, Tensor] | None:
        """Rotary positions, as CogVideoXPipeline prepares them; 2B has none."""
        config = self._config
        if not config["use_rotary_positional_embeddings"]:
            return None
        patch, patch_t = config["patch_size"], config["patch_size_t"]
        frames, height, width = noisy.shape[2:]
        grid = (height // patch, width // patch)
        base = (config["sample_height"] // patch, config["sample_width"] // patch)
        if patch_t is None:
            options: dict[str, Any] = {
                "crops_coords": _fitted(grid, base),
                "temporal_size": frames,
            }
        else:
            options = {
                "crops_coords": None,
                "temporal_size": -(-frames // patch_t),
                "grid_type": "slice",
                "max_size": base,
            }
        cos, sin = get_3d_rotary_pos_embed(
            config["attention_head_dim"], grid_size=grid, device=noisy.device, **options
        )
        return cos, sin

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
        """CogVideoX's DDIM with classifier-free guidance."""
        if per_frame:
            return frame_by_frame(
                self.sample,
                context,
                noise,
                clean=clean,
                region=region,
                size=self._config["patch_size_t"] or 1,
                denoiser=denoiser,
                strength=strength,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            )
        num_inference_steps = (
            self.sampling.num_inference_steps
            if num_inference_steps is None
            else num_inference_steps
        )
        guidance_scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        return self._denoise(
            context,
            noise,
            denoiser=denoiser,
            clean=clean,
            strength=strength,
            region=region,
            scales=self._guidance(guidance_scale, num_inference_steps),
        )

    def _guidance(self, scale: float, num_inference_steps: int) -> list[float]:
        """One scale a step."""
        if not self._dynamic:
            return [scale] * num_inference_steps
        times = self._schedule(num_inference_steps).timesteps.tolist()
        return [
            1
            + scale
            * (1 - math.cos(math.pi * ((num_inference_steps - time) / num_inference_steps) ** 5.0))
            / 2
            for time in times
        ]

    def latent_frames(self, segment: slice) -> slice:
        """Latent 0 is frame 0, latent k the frames 4k - 3 to 4k; padding belongs to frame 0."""
        start, stop, _ = segment.indices(self.shape.frames)
        first = -(-start // _STRIDE) + self._padding if start else 0
        return slice(first, -(-(stop - 1) // _STRIDE) + 1 + self._padding)

    def lora_targets(self) -> list[str]:
        """The projections of every block's attention, as in LocalDPO's table."""
        return [name for name, _ in self.denoiser.named_modules() if _ATTENTION.fullmatch(name)]

    def export_spec(self) -> ExportSpec:
        """As diffusers' CogVideoXPipeline and ComfyUI call it."""
        call: dict[str, Any] = {"use_dynamic_cfg": True} if self._dynamic else {}
        if (length := self._config["max_text_seq_length"]) != _PIPELINE_TEXT_LENGTH:
            call["max_sequence_length"] = length
        return ExportSpec(
            pipeline="CogVideoXPipeline",
            source=self._checkpoint.source,
            revision=self._checkpoint.revision,
            networks={"transformer": self.denoiser},
            scheduler=self.scheduler,
            index=self._checkpoint.config(file="model_index.json"),
            folder=self._checkpoint.folder,
            comfy=comfy_names,
            comfy_usage="For ComfyUI's own CogVideoX: put the .safetensors file into "
            "`models/loras` and choose it in the node LoraLoaderModelOnly. "
            "ComfyUI-CogVideoXWrapper reads what `--format diffusers` writes instead.",
            call=call,
        )


_PIPELINE_TEXT_LENGTH = 226  # where a call of CogVideoXPipeline says nothing else
_IN_BLOCK = re.compile(r"transformer_blocks\.(?P<block>\d+)\.(?P<layer>.+)")
_COMFY_LAYERS: Mapping[str, str] = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
}


def comfy_names(module: str) -> LoraNames | None:
    """The names of ComfyUI's own implementation, behind `diffusion_model.` as in all its LoRAs.

    comfyanonymous/ComfyUI, comfy/ldm/cogvideo/model.py: CogVideoXBlock; comfy/lora.py:
    model_lora_keys_unet ("generic lora format").
    """
    found = _IN_BLOCK.fullmatch(module)
    if found is None or found["layer"] not in _COMFY_LAYERS:
        return None
    stem = f"diffusion_model.blocks.{found['block']}.{_COMFY_LAYERS[found['layer']]}"
    return LoraNames(down=f"{stem}.lora_A.weight", up=f"{stem}.lora_B.weight")


def _fitted(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Corners of a grid of patches, scaled to fit into the one of training, in the middle of it."""
    scale = min(base[0] / grid[0], base[1] / grid[1])
    size = [round(scale * side) for side in grid]
    top, left = (round((most - side) / 2) for most, side in zip(base, size, strict=True))
    return (top, left), (top + size[0], left + size[1])
