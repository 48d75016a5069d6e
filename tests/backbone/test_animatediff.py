from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CPU, SHAPE, load_small
from diffusers import AnimateDiffPipeline, DDPMScheduler

from dpo_video.backbone.animatediff import AnimateDiff, AnimateDiffModel
from dpo_video.errors import UserError
from dpo_video.strategies import Sampling


def test_sampling_from_noise_equals_diffusers_pipeline(small_folder: Path) -> None:
    model = load_small(small_folder)
    pipeline = AnimateDiffPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.denoiser,
        motion_adapter=None,
        scheduler=model.scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        "a red square moving left slowly",
        num_frames=SHAPE.frames,
        height=SHAPE.height,
        width=SHAPE.width,
        num_inference_steps=4,
        guidance_scale=2.0,
        latents=noise,
        output_type="latent",
    ).frames
    ours = model.sample(model.encode_prompts(["a red square moving left slowly"]), noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    decoded = pipeline.decode_latents(ours) / 2 + 0.5
    torch.testing.assert_close(model.decode_videos(ours), decoded.clamp(0, 1).float())


def test_noise_and_target_equal_the_schedulers(small_model: AnimateDiffModel) -> None:
    scheduler = DDPMScheduler.from_config(small_model.scheduler.config)
    clean, noise = torch.randn(2, 3, *small_model.latent_shape)
    level = torch.tensor([0.0, 500.0, 999.0])
    torch.testing.assert_close(
        small_model.add_noise(clean, noise, level), scheduler.add_noise(clean, noise, level.long())
    )
    assert small_model.target(clean, noise, level) is noise
    small_model.scheduler.register_to_config(prediction_type="v_prediction")
    torch.testing.assert_close(
        small_model.target(clean, noise, level),
        scheduler.get_velocity(clean, noise, level.long()),
    )


def test_latents_are_scaled_by_the_factor_and_back(small_model: AnimateDiffModel) -> None:
    videos = torch.rand(1, 3, SHAPE.frames, SHAPE.height, SHAPE.width)
    frame = small_model.vae.encode(2 * videos[:, :, 1] - 1).latent_dist.mean
    factor = small_model.vae.config.scaling_factor
    latents = small_model.encode_videos(videos)
    assert latents.shape == (1, *small_model.latent_shape)
    torch.testing.assert_close(latents[:, :, 1], frame * factor, rtol=1e-4, atol=1e-5)
    decoded = (small_model.vae.decode(frame).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(
        small_model.decode_videos(latents)[:, :, 1], decoded, rtol=1e-4, atol=1e-5
    )


def test_levels_are_uniform_timesteps(small_model: AnimateDiffModel) -> None:
    levels = small_model.sample_levels(20_000, torch.Generator().manual_seed(0))
    assert levels.min() == 0 and levels.max() == 999
    assert abs(levels.mean().item() - 499.5) < 10
    assert (levels == levels.round()).all()


def test_outside_the_region_nothing_changes(
    small_model: AnimateDiffModel, generator: torch.Generator
) -> None:
    clean, noise = torch.randn(2, 2, *small_model.latent_shape, generator=generator)
    region = (torch.rand(2, 1, *small_model.latent_shape[1:], generator=generator) < 0.3).float()
    drawn = small_model.sample(
        small_model.encode_prompts(["a red square", "a blue star"]),
        noise,
        clean=clean,
        level=0.75,
        region=region,
    )
    outside = (region == 0).expand_as(drawn)
    assert torch.equal(drawn[outside], clean[outside])
    assert (drawn[~outside] != clean[~outside]).all()


def test_a_low_level_stays_nearer_to_the_clip(
    small_model: AnimateDiffModel, generator: torch.Generator
) -> None:
    clean, noise = torch.randn(2, 1, *small_model.latent_shape, generator=generator)
    context = small_model.encode_prompts(["a red square"])
    small_model.sampling = Sampling(steps=10, guidance=1.0)
    distances = [
        (small_model.sample(context, noise, clean=clean, level=level) - clean).norm().item()
        for level in (0.1, 0.5, 1.0)
    ]
    assert distances[0] < distances[1] < distances[2]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot load the unet of .*backbone\.model"):
        AnimateDiff(model=str(tmp_path)).load(CPU, torch.float32)
