"""Minimal Wan checkpoints of the real classes, random weights: all three layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dpo_video.backbone.wan import Wan, WanModel
from dpo_video.tiny import scenes
from dpo_video.types import Placement

TEXT_LENGTH = 12
OPTIONS = {"frames": 5, "height": 16, "width": 16, "fps": 8.0, "text_length": TEXT_LENGTH}
OPTIONS_TI2V = {**OPTIONS, "height": 32, "width": 32}


def unipc() -> UniPCMultistepScheduler:
    """The scheduler of Wan's own checkpoints."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def euler() -> FlowMatchEulerDiscreteScheduler:
    """The other scheduler that Wan's authors sample with."""
    return FlowMatchEulerDiscreteScheduler(shift=5.0)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word and an end-of-sequence token, as in T5."""
    words = {word for caption in scenes.spread_captions(200) for word in caption.split()}
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {word: 3 + i for i, word in enumerate(sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def save_small_wan(
    folder: Path,
    *,
    scheduler: SchedulerMixin | None = None,
    ti2v: bool = False,
    boundary_ratio: float | None = None,
) -> Path:
    """Write a checkpoint in WanPipeline's layout.

    Args:
        folder: Where to write.
        scheduler: `unipc()` if left out.
        ti2v: TI2V-5B's layout: 16 pixels per latent by a patchified VAE, a timestep per token.
        boundary_ratio: A14B's layout, with two experts.
    """
    torch.manual_seed(0)
    channels = 6 if ti2v else 4
    # Different in every channel, some above 1 and some below.
    statistics = {
        "latents_mean": [0.3 * i - 0.5 for i in range(channels)],
        "latents_std": [0.4 + 0.7 * i for i in range(channels)],
    }
    wide: dict[str, Any] = {"z_dim": channels, "num_res_blocks": 1, **statistics}
    if ti2v:
        wide |= {
            "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
            "scale_factor_spatial": 16, "dim_mult": [1, 1, 1, 1], "decoder_base_dim": 4,
        }  # fmt: skip
    tokenizer = new_tokenizer()
    encoder = UMT5Config(
        vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        dropout_rate=0.0,
    )  # fmt: skip
    denoisers = [
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=channels,
            out_channels=channels, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2,
            rope_max_seq_len=32,
        )
        for _ in range(1 if boundary_ratio is None else 2)
    ]  # fmt: skip
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(encoder),
        vae=AutoencoderKLWan(base_dim=4, **{"dim_mult": [1, 1, 1, 1], **wide}),
        scheduler=unipc() if scheduler is None else scheduler,
        transformer=denoisers[0],
        transformer_2=denoisers[1] if boundary_ratio is not None else None,
        boundary_ratio=boundary_ratio,
        expand_timesteps=ti2v,
    ).save_pretrained(folder)
    return folder


def load_small_wan(folder: Path, **options: Any) -> WanModel:
    """Load a fresh copy."""
    model = Wan(model=str(folder), **{**OPTIONS, **options}).load(Placement())
    assert isinstance(model, WanModel)
    return model
