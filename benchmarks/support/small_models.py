"""Small models of the supported families: their own classes with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from dpo_video.backbone.cogvideox import CogVideoX
from dpo_video.backbone.tiny import Tiny
from dpo_video.backbone.wan import Wan
from dpo_video.strategies import VideoModel
from dpo_video.types import Placement


def tiny(
    folder: Path, device: torch.device, quick: bool, dtype: torch.dtype = torch.float32
) -> VideoModel:
    return Tiny().load(Placement(device, dtype))


def small_wan(
    folder: Path, device: torch.device, quick: bool, dtype: torch.dtype = torch.float32
) -> VideoModel:
    """Wan's classes with random weights: 1280 tokens of 384 channels in 4 layers.

    Wide enough for matrix products to dominate a layer's time, as at full size: with 320 tokens of
    192 channels, a call of one video took more than half the time of a call of two.
    """
    if not folder.exists():
        torch.manual_seed(0)
        heads, layers, width = (2, 1, 24) if quick else (6, 4, 64)
        parts = {
            "transformer": WanTransformer3DModel(
                num_attention_heads=heads, attention_head_dim=width, in_channels=4, out_channels=4,
                text_dim=64, freq_dim=64, ffn_dim=8 * heads * width // 3, num_layers=layers,
                rope_max_seq_len=64,
            ),
            "vae": AutoencoderKLWan(
                base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
            ),
            "text_encoder": UMT5EncoderModel(
                UMT5Config(vocab_size=8, d_model=64, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            ),
            "scheduler": UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        }  # fmt: skip
        for name, part in parts.items():
            part.save_pretrained(folder / name)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    size = 32 if quick else 256
    options = Wan(model=str(folder), frames=17, height=size, width=size, text_length=64)
    return options.load(Placement(device, dtype))


def small_cogvideox(
    folder: Path, device: torch.device, quick: bool, dtype: torch.dtype = torch.float32
) -> VideoModel:
    """CogVideoX's classes with random weights: 1280 tokens of 384 channels in 4 layers."""
    torch.manual_seed(0)
    heads, layers, width = (2, 1, 16) if quick else (6, 4, 64)
    parts = {
        "transformer": CogVideoXTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=width, in_channels=4, out_channels=4,
            time_embed_dim=64, text_embed_dim=64, num_layers=layers, sample_width=32,
            sample_height=32, sample_frames=17, max_text_seq_length=64,
        ),
        "vae": AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(4, 4, 4, 4),
            latent_channels=4, layers_per_block=1, norm_num_groups=2,
        ),
        "text_encoder": T5EncoderModel(
            T5Config(vocab_size=8, d_model=64, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")),
            pad_token="<pad>",
        ),
        "scheduler": CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    }  # fmt: skip
    for parameter in parts[
        "transformer"
    ].parameters():  # with its own initialization the output is near zero
        torch.nn.init.normal_(parameter, std=0.05)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}))
    size = 32 if quick else 256
    options = CogVideoX(model=str(folder), frames=17, height=size, width=size)
    return options.load(Placement(device, dtype))


SMALL = {"animatediff": tiny, "cogvideox": small_cogvideox, "wan": small_wan}
"""Backbone to its small model; `tiny` is an AnimateDiff."""
