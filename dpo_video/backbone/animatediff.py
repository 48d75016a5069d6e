"""AnimateDiff: Stable Diffusion's UNet with motion modules between its layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from pydantic import Field
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

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

_ATTENTION = re.compile(r".*motion_modules.*\.(to_q|to_k|to_v|to_out\.0)$")
_FRAMES_AT_ONCE = 64  # through the VAE
# The motion modules were trained on this schedule (guoyww/AnimateDiff, configs/inference), which is
# not the one that Stable Diffusion's checkpoints come with.
_MOTION_SCHEDULE: Mapping[str, Any] = {
    "beta_schedule": "linear",
    "steps_offset": 1,
    "clip_sample": False,
}


@final
class AnimateDiff(Backbone):
    """Stable Diffusion 1.5 with a motion adapter (Guo et al. 2023, arXiv 2307.04725)."""

    guards: ClassVar[tuple[str, ...]] = ("sharpness",)

    training: ClassVar[Mapping[str, Any]] = {
        "rank": 16,
        "alpha": 32.0,
        "learning_rate": 1e-5,
    }  # Video-DPO

    model: str = "emilianJR/epiCRealism"
    """Hub id or folder of the base model. A folder whose UNet already has motion modules needs no
    adapter."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the hub; its main branch when not set."""
    motion_adapter: str = "guoyww/animatediff-motion-adapter-v1-5-2"
    """Hub id or folder of the motion adapter."""
    motion_adapter_revision: str | None = None
    """Branch, tag or commit of the motion adapter on the hub; its main branch when not set."""
    frames: int = Field(default=16, ge=2, le=32)
    """Frames of a video."""
    height: int = Field(default=512, multiple_of=8)
    """Pixels."""
    width: int = Field(default=512, multiple_of=8)
    """Pixels."""
    fps: float = Field(default=8.0, gt=0)
    """Frames per second that clips are resampled to."""
    timestep_spacing: Literal["trailing", "linspace", "leading"] = "trailing"
    """How sampling steps are spread over the schedule, as diffusers' DDIMScheduler means it. With
    "linspace", as in its AnimateDiff examples, its steps do not end where the next ones begin, and
    leave noise in the video; with few steps, much."""

    def load(self, placement: Placement) -> VideoModel:
        """Load the parts; a UserError if one is missing."""
        shape = VideoShape(frames=self.frames, height=self.height, width=self.width, fps=self.fps)
        return load_checkpoint(
            Checkpoint(source=self.model, revision=self.revision, placement=placement),
            shape=shape,
            sampling=Sampling(num_inference_steps=25, guidance_scale=7.5),
            motion_adapter=Checkpoint(
                source=self.motion_adapter,
                revision=self.motion_adapter_revision,
                option="backbone.motion_adapter",
                placement=placement,
            ),
            timestep_spacing=self.timestep_spacing,
        )

    def clips(self, seed: int) -> Iterator[Clip] | None:
        """This family has no clips of its own."""
        return None

    def prompts(self, n: int) -> list[str]:
        """Eight diverse prompts, cycled."""
        return diverse(n)


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    shape: VideoShape,
    sampling: Sampling,
    motion_adapter: Checkpoint | None = None,
    timestep_spacing: str | None = None,
) -> VideoModel:
    """Load a checkpoint in diffusers' layout.

    If its UNet is a plain Stable Diffusion one, `motion_adapter` is put on it, and the schedule is
    the one that motion modules were trained on. Otherwise all is as the checkpoint says.
    """
    schedule: dict[str, Any] = {}
    dtype = checkpoint.placement.dtype
    if timestep_spacing is not None:
        schedule["timestep_spacing"] = timestep_spacing
    digests = [checkpoint.digest("unet", "vae", "text_encoder", "scheduler")]
    if checkpoint.config("unet").get("_class_name") == "UNetMotionModel":
        unet = checkpoint.load(UNetMotionModel.from_pretrained, "unet", torch_dtype=dtype)
        motion_adapter = None
    elif motion_adapter is None:
        raise UserError(
            f"The UNet of '{checkpoint.source}' has no motion modules. Name a motion adapter "
            "(--set backbone.motion_adapter=...)."
        )
    else:
        adapter = motion_adapter.load(MotionAdapter.from_pretrained, torch_dtype=dtype)
        spatial = checkpoint.load(UNet2DConditionModel.from_pretrained, "unet", torch_dtype=dtype)
        with torch.device("meta" if checkpoint.placement.on_meta else "cpu"):
            unet = UNetMotionModel.from_unet2d(spatial, adapter).to(dtype)
        schedule = {**_MOTION_SCHEDULE, **schedule}
        digests.append(motion_adapter.digest(""))
    return AnimateDiffModel(
        unet=unet,
        checkpoint=checkpoint,
        motion_adapter=motion_adapter,
        scheduler=checkpoint.load(DDIMScheduler.from_pretrained, "scheduler", **schedule),
        shape=shape,
        sampling=sampling,
        identity=identity(*digests, dtype=dtype),
    )


@final
class AnimateDiffModel(DDIMModel):
    """A loaded AnimateDiff model. Levels are timesteps of the training schedule."""

    def __init__(
        self,
        *,
        unet: UNetMotionModel,
        checkpoint: Checkpoint,
        motion_adapter: Checkpoint | None,
        scheduler: DDIMScheduler,
        shape: VideoShape,
        sampling: Sampling,
        identity: str,
    ) -> None:
        placement = checkpoint.placement
        device, dtype = placement.device, placement.dtype
        self.denoiser: nn.Module = place_denoiser(unet, placement)
        self.identity = identity
        self._checkpoint, self._motion_adapter = checkpoint, motion_adapter
        self.device, self.dtype, self.shape, self.sampling = device, dtype, shape, sampling
        self.tokenizer = checkpoint.load(CLIPTokenizer.from_pretrained, "tokenizer")

        def load_vae() -> AutoencoderKL:
            vae = checkpoint.load(AutoencoderKL.from_pretrained, "vae", torch_dtype=dtype)
            return place(vae, placement)

        def load_text_encoder() -> CLIPTextModel:
            encoder = checkpoint.load(CLIPTextModel.from_pretrained, "text_encoder", dtype=dtype)
            return place(encoder, placement)

        super().__init__(
            scheduler=scheduler,
            vae=Lazy(load_vae),
            vae_config=checkpoint.full_config(AutoencoderKL, "vae"),
            text_encoder=Lazy(load_text_encoder),
        )
        self._check_shape(unet.config.motion_max_seq_length)

    def _check_shape(self, most: int) -> None:
        if self.shape.frames > most:
            raise UserError(
                f"These motion modules see at most {most} frames at once, not {self.shape.frames}. "
                f"Lower it (--set backbone.frames={most})."
            )
        for name in ("height", "width"):
            if getattr(self.shape, name) % self._factor:
                raise UserError(
                    f"The {name} must be a multiple of {self._factor} pixels, which this VAE makes "
                    f"one of, and is {getattr(self.shape, name)} (--set backbone.{name}=...)."
                )

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """One vector a token, as many as the text encoder has places."""
        text = self._checkpoint.config("text_encoder")
        return {"prompt_embeds": (text["max_position_embeddings"], text["hidden_size"])}

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """`(c, f, h, w)`: every frame is encoded alone."""
        height, width = self.shape.height // self._factor, self.shape.width // self._factor
        return self._vae_config["latent_channels"], self.shape.frames, height, width

    @torch.no_grad()
    def encode_videos(self, videos: Videos) -> Latents:
        """Frame by frame, by the posterior's mean, times the VAE's scaling factor."""
        frames = (2 * videos.to(self.device, self.dtype) - 1).transpose(1, 2).flatten(0, 1)
        latents = torch.cat(
            [self.vae.encode(part).latent_dist.mean for part in frames.split(_FRAMES_AT_ONCE)]
        )
        scaled = latents.float() * self._vae_config["scaling_factor"]
        return scaled.unflatten(0, (len(videos), -1)).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode_videos(self, latents: Latents) -> Videos:
        """Frame by frame, back to [0, 1]."""
        frames = (latents / self._vae_config["scaling_factor"]).transpose(1, 2).flatten(0, 1)
        parts = frames.to(self.device, self.dtype).split(_FRAMES_AT_ONCE)
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

    def predict(
        self, denoiser: nn.Module, noisy: Latents, timestep: PerPair, context: Context
    ) -> Latents:
        """One forward pass; every frame sees the same text."""
        text = context["prompt_embeds"].to(self.dtype).repeat_interleave(noisy.shape[2], dim=0)
        prediction: Latents = denoiser(
            noisy.to(self.dtype), timestep.to(noisy.device), text, return_dict=False
        )[0]
        return prediction

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
        """DDIM (Song et al. 2021, eta 0) with classifier-free guidance."""
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
            scales=[guidance_scale] * num_inference_steps,
        )

    def latent_frames(self, segment: slice) -> slice:
        """The same frames: this VAE has no temporal stride."""
        return segment

    def lora_targets(self) -> list[str]:
        """The attention projections of the motion modules, and nothing else."""
        return [name for name, _ in self.denoiser.named_modules() if _ATTENTION.match(name)]

    def export_spec(self) -> ExportSpec:
        """As diffusers' AnimateDiffPipeline and ComfyUI's AnimateDiff-Evolved call it."""
        arguments = {}
        if (adapter := self._motion_adapter) is not None:
            revision = f", revision={adapter.revision!r}" if adapter.revision else ""
            arguments["motion_adapter"] = (
                f"MotionAdapter.from_pretrained({adapter.source!r}{revision})"
            )
        return ExportSpec(
            pipeline="AnimateDiffPipeline",
            source=self._checkpoint.source,
            revision=self._checkpoint.revision,
            networks={"unet": self.denoiser},
            scheduler=self.scheduler,
            index=_INDEX,
            folder=self._checkpoint.folder,
            comfy=comfy_names,
            comfy_usage="For AnimateDiff-Evolved in ComfyUI: put the .safetensors file into "
            "`models/animatediff_motion_lora` and choose it in the node Load AnimateDiff LoRA.",
            arguments=arguments,
        )


# Checkpoints of Stable Diffusion have an index of another pipeline.
_INDEX: Mapping[str, Any] = {
    "unet": ("diffusers", "UNetMotionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "motion_adapter": (None, None),
    "feature_extractor": (None, None),
    "image_encoder": (None, None),
}
_IN_MOTION_MODULE = re.compile(
    r"(?P<module>.*motion_modules\.\d+)\.(?P<block>transformer_blocks\.\d+)"
    r"\.attn(?P<attention>[12])\.(?P<projection>to_q|to_k|to_v|to_out)(\.0)?"
)


def comfy_names(module: str) -> LoraNames | None:
    """The layout of AnimateDiff's own motion LoRAs, which AnimateDiff-Evolved reads.

    Modules are named as in diffusers' scripts/convert_animatediff_motion_lora_to_diffusers.py, the
    other way round; for the factors' names see Kosinkadink/ComfyUI-AnimateDiff-Evolved,
    animatediff/model_injection.py: load_motion_lora_as_patches.
    """
    if (found := _IN_MOTION_MODULE.fullmatch(module)) is None:
        return None
    stem = (
        f"{found['module']}.temporal_transformer.{found['block']}.attention_blocks."
        f"{int(found['attention']) - 1}.processor.{found['projection']}_lora"
    )
    return LoraNames(down=f"{stem}.down.weight", up=f"{stem}.up.weight")
