"""Shared code of the families of published checkpoints."""

from __future__ import annotations

import re
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from dpo_video.data.prompts import cycled, shipped_prompts
from dpo_video.diffusion.pretrained import Checkpoint, Lazy, free
from dpo_video.diffusion.sampling import frame_by_frame
from dpo_video.errors import UserError
from dpo_video.strategies import Backbone, Sampling, VideoModel
from dpo_video.types import Clip, Context, Latents, Region, VideoShape

_NEGATIVES_KEPT = 64  # encoded; each may be megabytes


class PretrainedBackbone(Backbone):
    """A family whose models show anything, and that has no clips of its own."""

    guards: ClassVar[tuple[str, ...]] = ("sharpness", "contrast", "new_frames")

    def clips(self, seed: int) -> Iterator[Clip] | None:
        """None: the family has no clips of its own."""
        return None

    def prompts(self, n: int) -> list[str]:
        """The package's list `evaluation`, cycled."""
        return cycled(shipped_prompts("evaluation"), n)


class PretrainedModel(VideoModel):
    """A model loaded from a checkpoint. A subclass sets `denoiser` and `identity`.

    Args:
        checkpoint: Its source and placement.
        shape: Of its videos.
        sampling: Defaults of `sample`.
        vae: Loaded on first use.
        vae_config: Complete with defaults.
        text_encoder: Loaded on first use.
        negative_prompt: Sampling is guided away from it where `sample` is given no other.
    """

    attention: ClassVar[re.Pattern[str]]
    """Names of the modules that get a LoRA."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        shape: VideoShape,
        sampling: Sampling,
        vae: Lazy[Any],
        vae_config: Mapping[str, Any],
        text_encoder: Lazy[Any],
        negative_prompt: str = "",
    ) -> None:
        self.device, self.dtype = checkpoint.placement.device, checkpoint.placement.dtype
        self.shape, self.sampling = shape, sampling
        self._checkpoint = checkpoint
        self._vae, self._vae_config, self._text_encoder = vae, vae_config, text_encoder
        self._negative_prompt = negative_prompt
        self._negatives: dict[str, Context] = {}

    @property
    def vae(self) -> Any:
        """Loaded on first use."""
        return self._vae.get()

    @property
    def text_encoder(self) -> Any:
        """Loaded on first use."""
        return self._text_encoder.get()

    def release(self) -> None:
        """Free the VAE and the text encoder; encoded negative prompts are kept."""
        free(self._vae, self._text_encoder)

    def lora_targets(self) -> list[str]:
        """The attention projections of the denoiser."""
        return [n for n, _ in self.denoiser.named_modules() if self.attention.fullmatch(n)]

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
        """Sample with the family's scheduler and classifier-free guidance."""
        steps = num_inference_steps
        options: dict[str, Any] = {
            "clean": clean,
            "region": region,
            "denoiser": self.denoiser if denoiser is None else denoiser,
            "strength": strength,
            "steps": self.sampling.num_inference_steps if steps is None else steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": self._negative_prompt
            if negative_prompt is None
            else negative_prompt,
            "dynamic_guidance": dynamic_guidance,
        }
        if per_frame:
            return self._sample_frames(context, noise, **options)
        return self._sample(context, noise, **options)

    @abstractmethod
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
        """As `sample`, of whole videos; guidance that is None is the backbone's."""

    def _sample_frames(self, context: Context, noise: Latents, **options: Any) -> Latents:
        """As `_sample`, of every frame on its own: as the smallest video of the family."""
        return frame_by_frame(self._sample, context, noise, size=self._smallest, **options)

    @property
    def _smallest(self) -> int:
        """Latent frames of the smallest video."""
        return 1

    def negative_context(self, prompt: str | None = None) -> Context:
        """Encode a negative prompt, once."""
        found = self._negative_context(self._negative_prompt if prompt is None else prompt, 1)
        return {name: value.cpu() for name, value in found.items()}

    def keep_negative(self, context: Context) -> None:
        """Keep an encoded negative prompt of this model, if its shapes are right."""
        expected = self.prompt_shapes() or {}
        if {name: (1, *shape) for name, shape in expected.items()} == {
            name: tuple(value.shape) for name, value in context.items()
        }:
            self._negatives[self._negative_prompt] = {
                name: value.to(self.device, self.dtype) for name, value in context.items()
            }

    def _negative_context(self, prompt: str, count: int) -> Context:
        """An encoded negative prompt, repeated."""
        if prompt not in self._negatives:
            if len(self._negatives) == _NEGATIVES_KEPT:
                del self._negatives[next(iter(self._negatives))]
            self._negatives[prompt] = self.encode_prompts([prompt])
        return {
            name: value.expand(count, -1, -1) for name, value in self._negatives[prompt].items()
        }

    @property
    @abstractmethod
    def _reader(self) -> tuple[Any, int]:
        """The tokenizer, and the most tokens that the text encoder reads, the special ones too."""

    def _cleaned(self, prompt: str) -> str:
        """The prompt as it is tokenized."""
        return prompt

    def unread(self, prompt: str) -> str:
        """The words behind the last one that the text encoder reads completely."""
        tokenizer, length = self._reader
        room = length - tokenizer.num_special_tokens_to_add()
        words = prompt.split()

        def tokens(count: int) -> int:
            text = self._cleaned(" ".join(words[:count]))
            return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        if tokens(len(words)) <= room:
            return ""
        read = bisect_right(range(len(words)), room, key=tokens) - 1
        return " ".join(words[read:])

    def _tokens(self, prompts: Sequence[str]) -> Any:
        """Token ids and mask of prompts, cut and padded, on the model's device."""
        tokenizer, length = self._reader
        return tokenizer(
            [self._cleaned(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(self.device)


def refuse_dynamic(dynamic: bool | None) -> None:
    """A UserError for dynamic guidance on a family that has none."""
    if dynamic:
        raise UserError(
            "Only CogVideoX has dynamic guidance. Leave it out (--set "
            "pairs.dynamic_guidance=false), or use --backbone cogvideox."
        )


def to_pixels(decoded: torch.Tensor) -> torch.Tensor:
    """From a VAE's [-1, 1] to [0, 1], in fp32."""
    return (decoded.float() / 2 + 0.5).clamp(0, 1)
