"""A minimal AnimateDiff of the real classes with random weights, for tests and campaigns."""

from __future__ import annotations

import copy
import shutil
from functools import cache
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.tiny.recipe import SCHEDULE, TEXT_LENGTH, new_tokenizer
from dpo_video.backbone.animatediff import AnimateDiffModel, load_checkpoint
from dpo_video.diffusion.pretrained import Checkpoint
from dpo_video.strategies import Sampling
from dpo_video.types import VideoShape

SHAPE = VideoShape(frames=4, height=16, width=16, fps=8.0)
CPU = torch.device("cpu")


def save_small_animatediff(folder: Path) -> Path:
    """Write a checkpoint folder: 4 frames at 16x16, 4x4 latents."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    adapter = MotionAdapter(
        block_out_channels=(16, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=SHAPE.frames,
        use_motion_mid_block=False,
    )
    UNetMotionModel.from_unet2d(unet, adapter).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=SHAPE.height,
    ).save_pretrained(folder / "vae")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    DDIMScheduler(**SCHEDULE, clip_sample=False).save_pretrained(folder / "scheduler")
    return folder


def save_small_base(folder: Path) -> Path:
    """Write a Stable Diffusion checkpoint: a UNet without motion modules, and its own schedule."""
    save_small_animatediff(folder)
    shutil.rmtree(folder / "unet")
    torch.manual_seed(2)
    UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False
    ).save_pretrained(folder / "scheduler")
    return folder


def save_small_motion_adapter(folder: Path) -> Path:
    """Write a motion adapter for `save_small_base`."""
    torch.manual_seed(1)
    adapter = MotionAdapter(
        block_out_channels=(16, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=SHAPE.frames,
        use_motion_mid_block=False,
    )
    for parameter in adapter.parameters():  # its init gives modules that do nothing
        torch.nn.init.normal_(parameter, std=0.2)
    adapter.save_pretrained(folder)
    return folder


def load_small(folder: Path) -> AnimateDiffModel:
    """A fresh copy of the small model, whose denoiser a process reads once, which takes longer."""
    return copy.deepcopy(_read(folder))


@cache
def _read(folder: Path) -> AnimateDiffModel:
    model = load_checkpoint(
        Checkpoint(source=str(folder)),
        shape=SHAPE,
        sampling=Sampling(num_inference_steps=4, guidance_scale=2.0),
    )
    assert isinstance(model, AnimateDiffModel)
    return model
