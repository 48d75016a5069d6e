"""CogVideoX: a transformer over text and video tokens, on the latents of a causal VAE."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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

from dpo_video.backbone import _causal_vae, _comfy
from dpo_video.backbone._causal_vae import STRIDE
from dpo_video.backbone._ddim import DDIMModel
from dpo_video.backbone._pretrained import PretrainedBackbone, to_pixels
from dpo_video.diffusion.pretrained import Checkpoint, Lazy, identity, place, place_denoiser
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
    Videos,
    VideoShape,
)

# The VAE decodes two latent frames at a time, and a single first frame only of an odd number.
_FRAMES = 2 * STRIDE
_PIPELINE_TEXT_LENGTH = 226  # default of a call of CogVideoXPipeline


@final
class CogVideoX(PretrainedBackbone):
    """CogVideoX 2B, 5B and 1.5-5B: text-to-video transformers (Yang et al. 2024, arXiv 2408.06072).

    Its published checkpoints need sentencepiece (pip install 'dpo-video[cogvideox]'). For 1.5-5B
    set frames 81, height 768, width 1360 and fps 16. There is no image model: `img2img`
    pairs re-noise every latent frame as a video of one frame (in 1.5-5B, every two: its smallest
    patch in time), which is an adaptation of Video-DPO's method.
    """

    # LocalDPO's table (arXiv 2601.04068).
    training: ClassVar[Mapping[str, Any]] = {
        "rank": 64,
        "alpha": 128.0,
        "learning_rate": 1e-5,
        "betas": (0.9, 0.95),
        "weight_decay": 1e-3,
        "warmup_steps": 10,
    }

    model: ModelSource = "THUDM/CogVideoX-2b"
    """Hub id or folder in diffusers' layout, or a transformer as one .safetensors file with
    diffusers' names."""
    config: ModelSource | None = None
    """Where `model` is a single file: hub id or folder of everything but the transformer. Default:
    the only known model of the same shapes."""
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
    """Change the guidance scale from step to step, as diffusers' use_dynamic_cfg does."""
    negative_prompt: str = ""
    """Negative prompt of classifier-free guidance."""
    tiling: bool = False
    """Encode and decode videos in tiles: less memory, slightly different pixels."""

    def load(self, placement: Placement) -> VideoModel:
        """Load the denoiser; a UserError if a part is missing or the shape does not fit it."""
        checkpoint = Checkpoint(
            source=self.model,
            revision=self.revision,
            placement=placement,
            parts_in_file={"transformer": FilePart(network=CogVideoXTransformer3DModel)},
            config_source=self.config,
        )
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
            negative_prompt=self.negative_prompt,
            tiling=self.tiling,
        )


@final
class CogVideoXModel(DDIMModel):
    """A loaded CogVideoX model. Its timesteps are those of the training schedule."""

    attention: ClassVar[re.Pattern[str]] = re.compile(
        r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
    )

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        shape: VideoShape,
        dynamic_guidance: bool = False,
        negative_prompt: str = "",
        tiling: bool = False,
    ) -> None:
        scheduler: Any = checkpoint.load(CogVideoXDDIMScheduler, "scheduler")
        super().__init__(
            checkpoint,
            scheduler=scheduler,
            shape=shape,
            sampling=Sampling(num_inference_steps=50, guidance_scale=6.0),
            vae=Lazy(lambda: _load_vae(checkpoint, tiling)),
            vae_config=checkpoint.full_config(AutoencoderKLCogVideoX, "vae"),
            text_encoder=checkpoint.lazy(T5EncoderModel, "text_encoder"),
            negative_prompt=negative_prompt,
        )
        self._config = checkpoint.full_config(CogVideoXTransformer3DModel, "transformer")
        self._dynamic = dynamic_guidance
        self._check(checkpoint)
        self.identity = identity(
            checkpoint.digest("transformer", "vae", "text_encoder", "scheduler"), dtype=self.dtype
        )
        self.tokenizer: Any = checkpoint.load(AutoTokenizer, "tokenizer")
        self.denoiser: nn.Module = place_denoiser(
            checkpoint.load(CogVideoXTransformer3DModel, "transformer"), checkpoint.placement
        )

    def _check(self, checkpoint: Checkpoint) -> None:
        if self._config["in_channels"] != self._vae_config["latent_channels"]:
            raise UserError(
                f"'{checkpoint.source}' is an image-to-video model: it takes an image as input. "
                "Name a text-to-video one (--set backbone.model=THUDM/CogVideoX-2b)."
            )
        predicts = self.scheduler.config.prediction_type
        if predicts != "v_prediction":
            raise UserError(
                f"The scheduler of '{checkpoint.source}' predicts '{predicts}', but CogVideoX is "
                "trained on v_prediction. Use the scheduler_config.json of the original checkpoint."
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
                    f"This model has positions up to a {name} of {most} pixels, not {pixels}. "
                    f"Lower it (--set backbone.{name}=...)."
                )

    @property
    def _padding(self) -> int:
        """Latent frames put before a video, so that 1.5's patches in time divide it."""
        return -_causal_vae.latent_count(self.shape.frames) % self._smallest

    @property
    def _smallest(self) -> int:
        return self._config["patch_size_t"] or 1

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """`(c, f, h, w)`; the frames include the padding of 1.5."""
        return (
            self._vae_config["latent_channels"],
            _causal_vae.latent_count(self.shape.frames) + self._padding,
            self.shape.height // self._factor,
            self.shape.width // self._factor,
        )

    @torch.no_grad()
    def encode_videos(self, videos: Videos) -> Latents:
        """Encode: the posterior's mean, times the VAE's scaling factor.

        The first latent frame is repeated as padding, as in CogVideoX's own training. (The VAE's
        `invert_scale_latents` concerns the image of image-to-video models only.)
        """
        pixels = 2 * videos.to(self.device, self.dtype) - 1
        # One at a time: at full size, the activations of more do not fit on a GPU.
        means = torch.cat([self.vae.encode(video).latent_dist.mean for video in pixels.split(1)])
        latents = means.float() * self._vae_config["scaling_factor"]
        return torch.cat([latents[:, :, :1]] * self._padding + [latents], dim=2)

    @torch.no_grad()
    def decode_videos(self, latents: Latents) -> Videos:
        """Decode to [0, 1], without the padding."""
        scaled = latents[:, :, self._padding :] / self._vae_config["scaling_factor"]
        parts = scaled.to(self.device, self.dtype).split(1)
        return to_pixels(torch.cat([self.vae.decode(part).sample for part in parts]))

    @property
    def _reader(self) -> tuple[Any, int]:
        return self.tokenizer, self._config["max_text_seq_length"]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Context:
        """The text encoder's last hidden states, `[b, tokens, channels]`, padding included."""
        tokens = self._tokens(prompts)
        hidden = self.text_encoder(tokens["input_ids"]).last_hidden_state
        return {"prompt_embeds": hidden}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """One vector per token, as many as prompts are padded to."""
        tokens, width = self._config["max_text_seq_length"], self._config["text_embed_dim"]
        return {"prompt_embeds": (tokens, width)}

    def predict(
        self, denoiser: nn.Module, noisy: Latents, timestep: PerPair, context: Context
    ) -> Latents:
        """One forward pass; the network's axes are `b f c h w`."""
        prediction: Latents = denoiser(
            hidden_states=noisy.to(self.dtype).transpose(1, 2),
            encoder_hidden_states=context["prompt_embeds"].to(self.dtype),
            timestep=timestep.to(noisy.device),
            image_rotary_emb=self._rotary(noisy),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2)

    def _rotary(self, noisy: Latents) -> tuple[Tensor, Tensor] | None:
        """Rotary embeddings as in CogVideoXPipeline; None for 2B."""
        config = self._config
        if not config["use_rotary_positional_embeddings"]:
            return None
        patch, patch_t = config["patch_size"], config["patch_size_t"]
        frames, height, width = noisy.shape[2:]
        grid = (height // patch, width // patch)
        base = (config["sample_height"] // patch, config["sample_width"] // patch)
        if patch_t is None:
            options: dict[str, Any] = {
                "crops_coords": _crop(grid, base),
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

    def _guidance_scales(self, scale: float, steps: int, dynamic: bool | None) -> Sequence[float]:
        if not (self._dynamic if dynamic is None else dynamic):
            return [scale] * steps
        # diffusers' formula, which subtracts a timestep (0 to 999) from a number of steps.
        return [
            1 + scale * (1 - math.cos(math.pi * ((steps - timestep) / steps) ** 5.0)) / 2
            for timestep in self._schedule(steps).timesteps.tolist()
        ]

    def latent_frames(self, segment: slice) -> slice:
        """The latent frames of the causal VAE; padding belongs to frame 0."""
        return _causal_vae.latent_frames(segment, self.shape.frames, self._padding)

    def export_spec(self) -> ExportSpec:
        """Names in diffusers' CogVideoXPipeline and ComfyUI."""
        call: dict[str, Any] = {"use_dynamic_cfg": True} if self._dynamic else {}
        if self._negative_prompt:
            call["negative_prompt"] = self._negative_prompt
        if (length := self._config["max_text_seq_length"]) != _PIPELINE_TEXT_LENGTH:
            call["max_sequence_length"] = length
        return ExportSpec(
            pipeline="CogVideoXPipeline",
            **self._checkpoint.exported("transformer"),
            networks={"transformer": self.denoiser},
            scheduler=self.scheduler,
            index=self._checkpoint.config(file="model_index.json"),
            comfy=_comfy.cogvideox,
            comfy_usage="For ComfyUI's own CogVideoX: put the .safetensors file into "
            "`models/loras` and choose it in the node LoraLoaderModelOnly. "
            "ComfyUI-CogVideoXWrapper reads what `--format diffusers` writes instead.",
            call=call,
        )


def _load_vae(checkpoint: Checkpoint, tiling: bool) -> AutoencoderKLCogVideoX:
    vae = place(checkpoint.load(AutoencoderKLCogVideoX, "vae"), checkpoint.placement)
    if tiling:
        vae.enable_tiling()
    return vae


def _crop(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Corners of a grid of patches, scaled to fit into the training grid and centred in it."""
    scale = min(base[0] / grid[0], base[1] / grid[1])
    size = [round(scale * side) for side in grid]
    top, left = (round((most - side) / 2) for most, side in zip(base, size, strict=True))
    return (top, left), (top + size[0], left + size[1])
