"""Minimal CogVideoX checkpoints of the real classes, random weights: 2B, 5B and 1.5 layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dpo_video.backbone.cogvideox import CogVideoX, CogVideoXModel
from dpo_video.tiny import scenes
from dpo_video.types import Placement

Layout = Literal["2b", "5b", "1.5"]
CPU = torch.device("cpu")
TEXT_LENGTH = 12
OPTIONS: dict[str, Any] = {"frames": 9, "height": 16, "width": 32, "fps": 8.0}


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


def save_small_cogvideox(folder: Path, layout: Layout = "2b", **transformer: Any) -> Path:
    """Write a checkpoint in CogVideoXPipeline's layout; `transformer` overrides its options."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    options: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 1,
        "sample_width": 8,  # not the videos' size: positions are rescaled
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": TEXT_LENGTH,
        "use_rotary_positional_embeddings": layout != "2b",
    }
    if layout == "1.5":
        options |= {"patch_size_t": 2, "patch_bias": False, "sample_width": 30, "sample_height": 30}
    denoiser = CogVideoXTransformer3DModel(**{**options, **transformer})
    for parameter in denoiser.parameters():  # its init gives predictions close to zero
        torch.nn.init.normal_(parameter, std=0.2)
    CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=16,
                d_kv=8,
                d_ff=16,
                num_layers=1,
                num_heads=2,
                dropout_rate=0.0,
            )
        ).eval(),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            sample_height=32,
            sample_width=32,
            scaling_factor=4.0,  # about 1 / standard deviation of latents
            invert_scale_latents=layout == "1.5",
        ).eval(),
        transformer=denoiser.eval(),
        scheduler=CogVideoXDDIMScheduler(
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0 if layout == "2b" else 1.0,
            timestep_spacing="trailing",
        ),
    ).save_pretrained(folder)
    return folder


def load_small_cogvideox(folder: Path, **options: Any) -> CogVideoXModel:
    """Load a fresh copy."""
    model = CogVideoX(model=str(folder), **{**OPTIONS, **options}).load(Placement())
    assert isinstance(model, CogVideoXModel)
    return model


def stock_pipeline(folder: Path) -> CogVideoXPipeline:
    """diffusers' pipeline of the checkpoint."""
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
