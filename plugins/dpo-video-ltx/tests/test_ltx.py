"""Tests on a checkpoint of the real classes with random weights, which they write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from dpo_video_ltx import LTX, LTXModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dpo_video.plugin import Placement, UserError
from dpo_video.testing import check_backbone, check_backbone_model

SIZE = {"frames": 9, "height": 32, "width": 64, "fps": 8.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that diffusers' pipeline saved: one block, latents of 2x1x2 cells."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "dog": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    denoiser = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=1, caption_channels=16,
    )  # fmt: skip
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    encoder = T5EncoderModel(
        T5Config(vocab_size=4, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    folder = tmp_path_factory.mktemp("ltx")
    LTXPipeline(
        transformer=denoiser.eval(), vae=vae.eval(), text_encoder=encoder.eval(),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
            shift_terminal=0.1,
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LTXModel:
    loaded = LTX(model=str(checkpoint), **SIZE).load(Placement())
    assert isinstance(loaded, LTXModel)
    return loaded


def test_it_keeps_the_contract(model: LTXModel) -> None:
    check_backbone(LTX())
    check_backbone_model(model)


def test_its_videos_are_those_of_the_pipeline(model: LTXModel, checkpoint: Path) -> None:
    pipeline = LTXPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = pipeline(
        prompt="a dog", negative_prompt=LTX().negative_prompt, height=32, width=64, num_frames=9,
        frame_rate=8, num_inference_steps=3, guidance_scale=3.0, output_type="pt",
        latents=noise.flatten(2).transpose(1, 2),
    ).frames  # fmt: skip
    found = model.decode_videos(
        model.sample(model.encode_prompts(["a dog"]), noise, num_inference_steps=3)
    )
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=0, atol=1e-5)


def test_strength_starts_from_no_more_noise_than_asked(model: LTXModel) -> None:
    sigmas = model._sigmas(10)
    assert sigmas[-1 - round(10 * model.strength_at(0.7, 10))] <= 0.7
    assert sigmas[-2 - round(10 * model.strength_at(0.7, 10))] > 0.7


def test_latent_frames_cover_eight_frames_after_the_first(model: LTXModel) -> None:
    assert [model.latent_frames(slice(*each)) for each in ((0, 1), (1, 9), (0, 9))] == [
        slice(0, 1), slice(1, 2), slice(0, 2),
    ]  # fmt: skip


def test_a_size_that_it_cannot_encode_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="frames to a multiple of 8 and one"):
        LTX(model=str(checkpoint), **{**SIZE, "frames": 10}).load(Placement())
