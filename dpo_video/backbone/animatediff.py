"""AnimateDiff: Stable Diffusion's UNet with motion modules between its layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
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

from dpo_video.backbone import _comfy
from dpo_video.backbone._ddim import DDIMModel
from dpo_video.backbone._image_model import ImageModel, image_scheduler
from dpo_video.backbone._pretrained import PretrainedBackbone, refuse_dynamic, to_pixels
from dpo_video.diffusion.pretrained import Checkpoint, identity, place_denoiser, quiet
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

_FRAMES_AT_ONCE = 8  # of the VAE: 8 take an eighth of the memory of 64, and no more time
# Prefixes of Stable Diffusion's own checkpoints.
_IN_FILE: Mapping[str, FilePart] = {
    "unet": FilePart(network=UNet2DConditionModel, prefix="model.diffusion_model."),
    "vae": FilePart(network=AutoencoderKL, prefix="first_stage_model."),
    "text_encoder": FilePart(network=CLIPTextModel, prefix="cond_stage_model.transformer."),
}
# The schedule of the motion modules' training (guoyww/AnimateDiff, configs/inference). Stable
# Diffusion's checkpoints contain another one.
_MOTION_SCHEDULE: Mapping[str, Any] = {
    "beta_schedule": "linear",
    "steps_offset": 1,
    "clip_sample": False,
}


@final
class AnimateDiff(PretrainedBackbone):
    """AnimateDiff: Stable Diffusion 1.5 with a motion adapter (Guo et al. 2023, arXiv 2307.04725).

    The LoRA goes on the attention of the motion modules. `img2img` pairs bypass the motion modules
    and use the scheduler of `model`; a folder whose UNet already has motion modules has one
    schedule for both.
    """

    efficiency: ClassVar[float] = 0.15  # measured: 0.13 to 0.17 on an H200
    training: ClassVar[Mapping[str, Any]] = {
        "rank": 16,
        "alpha": 32.0,
        "learning_rate": 1e-5,
    }  # Video-DPO

    model: ModelSource = "emilianJR/epiCRealism"
    """Hub id, folder or .safetensors file of the base model. A folder whose UNet already has motion
    modules needs no adapter."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the hub; its main branch when not set."""
    config: ModelSource | None = None
    """Where `model` is a single file: hub id or folder of the configurations, the tokenizer and
    whatever the file lacks. Default: Stable Diffusion 1.5."""
    motion_adapter: ModelSource = "guoyww/animatediff-motion-adapter-v1-5-2"
    """Hub id, folder or .safetensors file of the motion adapter (motion module)."""
    motion_adapter_revision: str | None = None
    """Branch, tag or commit of the motion adapter on the hub; its main branch when not set."""
    motion_adapter_config: ModelSource | None = None
    """Where `motion_adapter` is a single file: hub id or folder of its configuration. Default: a
    config.json beside it, or the published adapter of the same shapes."""
    frames: int = Field(default=16, ge=2, le=32)
    """Frames of a video."""
    height: int = Field(default=512, multiple_of=8)
    """Pixels."""
    width: int = Field(default=512, multiple_of=8)
    """Pixels."""
    fps: float = Field(default=8.0, gt=0)
    """Frames per second that clips are resampled to."""
    negative_prompt: str = ""
    """Negative prompt of classifier-free guidance."""
    timestep_spacing: Literal["trailing", "linspace", "leading"] = "trailing"
    """Spacing of the sampling steps, as in diffusers' DDIMScheduler. With "linspace", as in its
    AnimateDiff examples, a step does not end where the next one begins, which leaves noise in the
    video, the more the fewer steps."""

    def load(self, placement: Placement) -> VideoModel:
        """Load the denoiser; a UserError if a part is missing or the shape does not fit it."""
        shape = VideoShape(frames=self.frames, height=self.height, width=self.width, fps=self.fps)
        return load_checkpoint(
            Checkpoint(
                source=self.model,
                revision=self.revision,
                placement=placement,
                parts_in_file=_IN_FILE,
                config_source=self.config,
            ),
            shape=shape,
            sampling=Sampling(num_inference_steps=25, guidance_scale=7.5),
            motion_adapter=Checkpoint(
                source=self.motion_adapter,
                revision=self.motion_adapter_revision,
                option="backbone.motion_adapter",
                placement=placement,
                parts_in_file={"": FilePart(network=MotionAdapter)},
                config_source=self.motion_adapter_config,
            ),
            timestep_spacing=self.timestep_spacing,
            negative_prompt=self.negative_prompt,
        )


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    shape: VideoShape,
    sampling: Sampling,
    motion_adapter: Checkpoint | None = None,
    timestep_spacing: str | None = None,
    negative_prompt: str = "",
) -> VideoModel:
    """Load a checkpoint in diffusers' layout.

    Where its UNet is Stable Diffusion's, `motion_adapter` is added to it, and the schedule is that
    of the motion modules' training. Otherwise UNet and schedule are the checkpoint's.
    """
    schedule: dict[str, Any] = {}
    dtype = checkpoint.placement.dtype
    if timestep_spacing is not None:
        schedule["timestep_spacing"] = timestep_spacing
    digests = [checkpoint.digest("unet", "vae", "text_encoder", "scheduler")]
    if checkpoint.config("unet").get("_class_name") == "UNetMotionModel":
        unet = checkpoint.load(UNetMotionModel, "unet")
        motion_adapter = None
    elif motion_adapter is None:
        raise UserError(
            f"The UNet of '{checkpoint.source}' has no motion modules. Name a motion adapter "
            "(--set backbone.motion_adapter=...)."
        )
    else:
        adapter = motion_adapter.load(MotionAdapter)
        spatial = checkpoint.load(UNet2DConditionModel, "unet")
        # diffusers warns of modules that stay in float32, and names none.
        with (
            quiet(),
            torch.device("meta" if checkpoint.placement.on_meta else "cpu"),
        ):
            unet = UNetMotionModel.from_unet2d(spatial, adapter).to(dtype)
        schedule = {**_MOTION_SCHEDULE, **schedule}
        digests.append(motion_adapter.digest(""))
    return AnimateDiffModel(
        unet=unet,
        checkpoint=checkpoint,
        motion_adapter=motion_adapter,
        scheduler=checkpoint.load(DDIMScheduler, "scheduler", **schedule),
        shape=shape,
        sampling=sampling,
        identity=identity(*digests, dtype=dtype),
        negative_prompt=negative_prompt,
    )


@final
class AnimateDiffModel(DDIMModel):
    """A loaded AnimateDiff model. Its timesteps are those of the training schedule."""

    attention: ClassVar[re.Pattern[str]] = re.compile(
        r".*motion_modules.*\.(to_q|to_k|to_v|to_out\.0)"
    )

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
        negative_prompt: str = "",
    ) -> None:
        super().__init__(
            checkpoint,
            scheduler=scheduler,
            shape=shape,
            sampling=sampling,
            vae=checkpoint.lazy(AutoencoderKL, "vae"),
            vae_config=checkpoint.full_config(AutoencoderKL, "vae"),
            text_encoder=checkpoint.lazy(CLIPTextModel, "text_encoder"),
            negative_prompt=negative_prompt,
        )
        self.denoiser: nn.Module = place_denoiser(unet, checkpoint.placement)
        self.identity, self._motion_adapter = identity, motion_adapter
        self.tokenizer: Any = checkpoint.load(CLIPTokenizer, "tokenizer")
        self._check_shape(unet.config.motion_max_seq_length)

    def _check_shape(self, most: int) -> None:
        if self.shape.frames > most:
            raise UserError(
                f"These motion modules take at most {most} frames, not {self.shape.frames}. "
                f"Lower it (--set backbone.frames={most})."
            )
        for name in ("height", "width"):
            if getattr(self.shape, name) % self._factor:
                raise UserError(
                    f"The {name} must be a multiple of {self._factor} pixels for this VAE, and is "
                    f"{getattr(self.shape, name)}. Change it (--set backbone.{name}=...)."
                )

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """One vector per token, as many as the text encoder has positions."""
        text = self._checkpoint.config("text_encoder")
        return {"prompt_embeds": (text["max_position_embeddings"], text["hidden_size"])}

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """`(c, f, h, w)`, a latent frame per frame."""
        height, width = self.shape.height // self._factor, self.shape.width // self._factor
        return self._vae_config["latent_channels"], self.shape.frames, height, width

    @torch.no_grad()
    def encode_videos(self, videos: Videos) -> Latents:
        """Encode frame by frame: the posterior's mean, times the VAE's scaling factor."""
        frames = (2 * videos.to(self.device, self.dtype) - 1).transpose(1, 2).flatten(0, 1)
        latents = torch.cat(
            [self.vae.encode(part).latent_dist.mean for part in frames.split(_FRAMES_AT_ONCE)]
        )
        scaled = latents.float() * self._vae_config["scaling_factor"]
        return scaled.unflatten(0, (len(videos), -1)).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode_videos(self, latents: Latents) -> Videos:
        """Decode frame by frame to [0, 1]."""
        frames = (latents / self._vae_config["scaling_factor"]).transpose(1, 2).flatten(0, 1)
        parts = frames.to(self.device, self.dtype).split(_FRAMES_AT_ONCE)
        pixels = to_pixels(torch.cat([self.vae.decode(part).sample for part in parts]))
        return pixels.unflatten(0, (len(latents), -1)).transpose(1, 2)

    @property
    def _reader(self) -> tuple[Any, int]:
        return self.tokenizer, self.tokenizer.model_max_length

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Context:
        """The text encoder's last hidden states, `[b, tokens, channels]`."""
        tokens = self._tokens(prompts)
        hidden = self.text_encoder(tokens["input_ids"]).last_hidden_state
        return {"prompt_embeds": hidden}

    def predict(
        self, denoiser: nn.Module, noisy: Latents, timestep: PerPair, context: Context
    ) -> Latents:
        """One forward pass, with the same text for every frame."""
        text = context["prompt_embeds"].to(self.dtype).repeat_interleave(noisy.shape[2], dim=0)
        prediction: Latents = denoiser(
            noisy.to(self.dtype), timestep.to(noisy.device), text, return_dict=False
        )[0]
        return prediction

    @cached_property
    def _image_scheduler(self) -> Any:
        return image_scheduler(self._checkpoint)

    def _sample_frames(self, context: Context, noise: Latents, **options: Any) -> Latents:
        """Every frame by the image model that the motion modules extend."""
        refuse_dynamic(options.pop("dynamic_guidance"))
        scale, negative = options.pop("guidance_scale"), options.pop("negative_prompt")
        if scale is None:
            scale = self.sampling.guidance_scale
        return ImageModel(self, self._image_scheduler).sample(
            context,
            noise,
            guidance_scale=scale,
            empty=None if scale == 1 else self._negative_context(negative, len(noise)),
            **options,
        )

    def latent_frames(self, segment: slice) -> slice:
        """The same frames: the VAE has no temporal stride."""
        return segment

    def export_spec(self) -> ExportSpec:
        """Names in diffusers' AnimateDiffPipeline and ComfyUI's AnimateDiff-Evolved."""
        arguments = {}
        if (adapter := self._motion_adapter) is not None:
            arguments["motion_adapter"] = adapter.loading_code("MotionAdapter")
        return ExportSpec(
            pipeline="AnimateDiffPipeline",
            **self._checkpoint.exported("unet"),
            networks={"unet": self.denoiser},
            scheduler=self.scheduler,
            index=_INDEX,
            comfy=_comfy.animatediff,
            comfy_usage="For AnimateDiff-Evolved in ComfyUI: put the .safetensors file into "
            "`models/animatediff_motion_lora` and choose it in the node Load AnimateDiff LoRA.",
            arguments=arguments,
            call={"negative_prompt": self._negative_prompt} if self._negative_prompt else {},
        )


# Checkpoints of Stable Diffusion contain the index of another pipeline.
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
