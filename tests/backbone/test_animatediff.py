from __future__ import annotations

import json
import re
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, SHAPE, load_small
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from small_animatediff import save_small_base, save_small_motion_adapter
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from dpo_video.backbone._image_model import without_motion
from dpo_video.backbone.animatediff import AnimateDiff, AnimateDiffModel
from dpo_video.errors import UserError
from dpo_video.strategies import Sampling
from dpo_video.types import Placement

PROMPT = "a red square moving left slowly"


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A motion adapter for `base_folder`, in its own folder."""
    return save_small_motion_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion checkpoint: a UNet without motion modules, and its own schedule."""
    return save_small_base(tmp_path_factory.mktemp("base"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load_base(base: Path, adapter: Path, **options: Any) -> AnimateDiffModel:
    shape = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
    backbone = AnimateDiff(model=str(base), motion_adapter=str(adapter), **{**shape, **options})
    model = backbone.load(Placement())
    assert isinstance(model, AnimateDiffModel)
    return model


def stock_sample(pipeline: AnimateDiffPipeline, noise: Tensor, num_inference_steps: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    frames: Tensor = pipeline(
        PROMPT,
        num_frames=SHAPE.frames,
        height=SHAPE.height,
        width=SHAPE.width,
        num_inference_steps=num_inference_steps,
        guidance_scale=2.0,
        latents=noise,
        output_type="latent",
    ).frames
    return frames


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("num_inference_steps", [4, 7])  # 7 does not divide 1000
def test_sampling_from_noise_equals_diffusers_pipeline(
    small_folder: Path, num_inference_steps: int, spacing: str
) -> None:
    model = load_small(small_folder)
    model.scheduler.register_to_config(timestep_spacing=spacing)
    pipeline = AnimateDiffPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.denoiser,
        motion_adapter=None,
        scheduler=DDIMScheduler.from_config(model.scheduler.config),
    )
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    theirs = stock_sample(pipeline, noise, num_inference_steps)
    ours = model.sample(
        model.encode_prompts([PROMPT]), noise, num_inference_steps=num_inference_steps
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    decoded = pipeline.decode_latents(ours) / 2 + 0.5
    torch.testing.assert_close(model.decode_videos(ours), decoded.clamp(0, 1).float())


def test_a_base_with_a_motion_adapter_equals_diffusers_pipeline(
    base_folder: Path, adapter_folder: Path
) -> None:
    model = load_base(base_folder, adapter_folder)
    pipeline = AnimateDiffPipeline(
        unet=UNet2DConditionModel.from_pretrained(base_folder, subfolder="unet"),
        vae=AutoencoderKL.from_pretrained(base_folder, subfolder="vae"),
        text_encoder=CLIPTextModel.from_pretrained(base_folder, subfolder="text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(base_folder, subfolder="tokenizer"),
        motion_adapter=MotionAdapter.from_pretrained(adapter_folder),
        # As in diffusers' examples of AnimateDiff, except for the spacing.
        scheduler=DDIMScheduler.from_pretrained(
            base_folder,
            subfolder="scheduler",
            clip_sample=False,
            timestep_spacing="trailing",
            beta_schedule="linear",
            steps_offset=1,
        ),
    )
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    ours = model.sample(
        model.encode_prompts([PROMPT]), noise, num_inference_steps=4, guidance_scale=2.0
    )
    torch.testing.assert_close(ours, stock_sample(pipeline, noise, 4), rtol=1e-4, atol=1e-4)


# --- single frames by the image model ---------------------------------------------------------

SD15 = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


# diffusers' Euler schedulers make an array of a tensor as NumPy 1 did.
OLD_NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def with_scheduler(base: Path, folder: Path, name: str, **options: Any) -> Path:
    """The checkpoint with another scheduler."""
    shutil.copytree(base, folder)
    config = {"_class_name": name, **SD15, **options}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


@OLD_NUMPY
@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (PNDMScheduler, {}),  # as in Stable Diffusion 1.5
        (DDIMScheduler, {"steps_offset": 0, "clip_sample": True}),  # corrected by the pipeline
        (EulerDiscreteScheduler, {}),  # scales the network's input
    ],
)
def test_single_frames_equal_those_of_stable_diffusions_img2img(
    base_folder: Path,
    adapter_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheduler: Any,
    options: dict[str, Any],
    guidance_scale: float,
) -> None:
    folder = with_scheduler(base_folder, tmp_path / "sd", scheduler.__name__, **options)
    model = load_base(folder, adapter_folder)
    pipeline = StableDiffusionImg2ImgPipeline(
        unet=UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        scheduler=scheduler.from_pretrained(folder, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    clean, noise = torch.randn(2, 1, *model.latent_shape, generator=seeded(0))
    monkeypatch.setattr(
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor",
        lambda *_, **__: noise[0].transpose(0, 1),
    )
    theirs = pipeline(
        [PROMPT] * SHAPE.frames,
        image=clean[0].transpose(0, 1),
        strength=0.15,
        num_inference_steps=20,
        guidance_scale=guidance_scale,
        negative_prompt=["blurred"] * SHAPE.frames,
        output_type="latent",
    ).images
    sample = partial(model.sample, model.encode_prompts([PROMPT]), noise, guidance_scale=2.0)
    before = sample(num_inference_steps=2)
    ours = sample(
        clean=clean,
        strength=0.15,
        per_frame=True,
        num_inference_steps=20,
        guidance_scale=guidance_scale,
        negative_prompt="blurred",
    )
    torch.testing.assert_close(ours[0].transpose(0, 1), theirs, rtol=1e-4, atol=1e-4)
    assert (ours - clean).abs().max() > 0.1
    # The motion modules are back.
    assert torch.equal(sample(num_inference_steps=2), before)


@OLD_NUMPY
def test_a_schedule_that_draws_noise_draws_the_same_again(
    base_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    name = EulerAncestralDiscreteScheduler.__name__
    model = load_base(with_scheduler(base_folder, tmp_path / "sd", name), adapter_folder)
    clean, noise = torch.randn(2, 1, *model.latent_shape, generator=seeded(0))
    state = torch.get_rng_state()
    one, two = (
        model.sample(model.encode_prompts([PROMPT]), noise, clean=clean, strength=0.5,
                     per_frame=True, num_inference_steps=4)
        for _ in range(2)
    )  # fmt: skip
    assert torch.equal(one, two) and torch.equal(state, torch.get_rng_state())


def test_frames_of_an_unknown_schedule_are_refused(
    base_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    folder = with_scheduler(base_folder, tmp_path / "sd", "TomorrowScheduler")
    model = load_base(folder, adapter_folder)  # its videos have AnimateDiff's schedule
    noise = torch.zeros(1, *model.latent_shape)
    with pytest.raises(UserError, match=r"'TomorrowScheduler'.*--pairs jitter"):
        model.sample(model.encode_prompts([PROMPT]), noise, per_frame=True)


def test_the_motion_modules_are_restored_after_an_error(
    base_folder: Path, adapter_folder: Path
) -> None:
    denoiser = load_base(base_folder, adapter_folder).denoiser
    modules = [m for n, m in denoiser.named_modules() if re.fullmatch(r".*motion_modules\.\d+", n)]
    with pytest.raises(ValueError, match="stop"), without_motion(denoiser):
        hidden = torch.randn(SHAPE.frames, 16, 4, 4)
        assert all(module(hidden, num_frames=SHAPE.frames) is hidden for module in modules)
        raise ValueError("stop")
    assert modules and not any("forward" in vars(module) for module in modules)


def test_the_identity_depends_on_the_motion_adapter(
    base_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    other = MotionAdapter.from_pretrained(adapter_folder)
    next(other.parameters()).data += 1
    other.save_pretrained(tmp_path)
    models = [load_base(base_folder, folder) for folder in (adapter_folder, tmp_path)]
    assert models[0].identity != models[1].identity
    assert models[0].identity == load_base(base_folder, adapter_folder).identity


class TrueNoise(nn.Module):
    """A network that predicts the true noise."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, noisy: Tensor, *inputs: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.noise.repeat(len(noisy), 1, 1, 1, 1),)


@pytest.mark.parametrize(
    ("spacing", "num_inference_steps", "least", "most"),
    [
        ("trailing", 25, 0.0, 1e-3),  # the default: no noise is left
        ("leading", 30, 0.0, 1e-3),
        ("trailing", 30, 0.0, 0.05),  # strides of 33 instead of 33.3
        ("linspace", 25, 0.005, 0.1),
        ("linspace", 4, 0.1, 10.0),
    ],
)
def test_noise_left_by_each_timestep_spacing(
    small_model: AnimateDiffModel, spacing: str, num_inference_steps: int, least: float, most: float
) -> None:
    """diffusers' DDIM steps down by T // steps, whatever the next timestep is."""
    small_model.scheduler.register_to_config(timestep_spacing=spacing)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, *small_model.latent_shape, generator=generator) for _ in "ab")
    drawn = small_model.sample(
        small_model.encode_prompts([PROMPT]), noise, denoiser=TrueNoise(noise), clean=clean,
        num_inference_steps=num_inference_steps,
    )  # fmt: skip
    left = ((drawn - clean) / noise).mean().abs().item()
    assert least <= left <= most


def test_noise_outside_a_region_matches_the_inside(
    small_model: AnimateDiffModel,
) -> None:
    """Also where a step of the scheduler does not end where the next one begins."""
    small_model.scheduler.register_to_config(timestep_spacing="linspace")
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, *small_model.latent_shape, generator=generator) for _ in "ab")
    region = torch.zeros(1, 1, *clean.shape[2:])
    region[..., :2] = 1
    seen: list[Tensor] = []

    class Watching(TrueNoise):
        def forward(self, noisy: Tensor, *inputs: Tensor, return_dict: bool) -> tuple[Tensor]:
            seen.append(noisy[:1])
            return super().forward(noisy, *inputs, return_dict=return_dict)

    small_model.sample(
        small_model.encode_prompts([PROMPT]), noise, denoiser=Watching(noise), clean=clean,
        region=region, num_inference_steps=4,
    )  # fmt: skip
    second = seen[1]
    a = small_model.scheduler.alphas_cumprod[999 - 250]
    expected = a.sqrt() * clean + (1 - a).sqrt() * noise
    torch.testing.assert_close(second, expected, rtol=1e-3, atol=1e-3)


def test_noise_and_target_equal_the_schedulers(small_model: AnimateDiffModel) -> None:
    scheduler = DDPMScheduler.from_config(small_model.scheduler.config)
    clean, noise = torch.randn(2, 3, *small_model.latent_shape)
    timestep = torch.tensor([0.0, 500.0, 999.0])
    torch.testing.assert_close(
        small_model.add_noise(clean, noise, timestep),
        scheduler.add_noise(clean, noise, timestep.long()),
    )
    assert small_model.target(clean, noise, timestep) is noise
    small_model.scheduler.register_to_config(prediction_type="v_prediction")
    torch.testing.assert_close(
        small_model.target(clean, noise, timestep),
        scheduler.get_velocity(clean, noise, timestep.long()),
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


def test_timesteps_are_uniform(small_model: AnimateDiffModel) -> None:
    timesteps = small_model.sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert timesteps.min() == 0 and timesteps.max() == 999
    assert abs(timesteps.mean().item() - 499.5) < 10
    assert (timesteps == timesteps.round()).all()


def test_outside_the_region_nothing_changes(
    small_model: AnimateDiffModel, generator: torch.Generator
) -> None:
    clean, noise = torch.randn(2, 2, *small_model.latent_shape, generator=generator)
    region = (torch.rand(2, 1, *small_model.latent_shape[1:], generator=generator) < 0.3).float()
    drawn = small_model.sample(
        small_model.encode_prompts(["a red square", "a blue star"]),
        noise,
        clean=clean,
        strength=0.75,
        region=region,
    )
    outside = (region == 0).expand_as(drawn)
    assert torch.equal(drawn[outside], clean[outside])
    assert (drawn[~outside] != clean[~outside]).all()


def test_a_low_strength_stays_nearer_to_the_clip(
    small_model: AnimateDiffModel, generator: torch.Generator
) -> None:
    clean, noise = torch.randn(2, 1, *small_model.latent_shape, generator=generator)
    context = small_model.encode_prompts(["a red square"])
    small_model.sampling = Sampling(num_inference_steps=10, guidance_scale=1.0)
    distances = [
        (small_model.sample(context, noise, clean=clean, strength=timestep) - clean).norm().item()
        for timestep in (0.1, 0.5, 1.0)
    ]
    assert distances[0] < distances[1] < distances[2]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot load the unet of .*backbone\.model"):
        AnimateDiff(model=str(tmp_path)).load(Placement())


def test_a_missing_adapter_is_named_by_its_own_option(base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"backbone\.motion_adapter"):
        load_base(base_folder, tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frames": 8}, r"at most 4 frames, not 8\..*backbone\.frames=4"),
        ({}, "Cannot load the unet"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, options: dict[str, int], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        load_base(base_folder if options else tmp_path, adapter_folder, **options)


def test_released_parts_load_again_unchanged(small_model: AnimateDiffModel) -> None:
    videos = torch.rand(1, 3, SHAPE.frames, SHAPE.height, SHAPE.width)
    before = small_model.encode_videos(videos), small_model.encode_prompts([PROMPT])
    parts = weakref.ref(small_model.vae), weakref.ref(small_model.text_encoder)
    small_model.release()
    assert [part() for part in parts] == [None, None]
    assert torch.equal(small_model.encode_videos(videos), before[0])
    again = small_model.encode_prompts([PROMPT])
    assert torch.equal(again["prompt_embeds"], before[1]["prompt_embeds"])


def test_the_end_that_is_not_read_is_named(small_model: AnimateDiffModel) -> None:
    prompt = "a red square " * 40 + "moving left"
    end = small_model.unread(prompt)
    kept = prompt.removesuffix(end)
    assert end.endswith("moving left") and kept != prompt
    both = [
        small_model.encode_prompts([text])["prompt_embeds"] for text in (prompt, kept + "a star")
    ]
    torch.testing.assert_close(*both, rtol=0, atol=0)
    assert small_model.unread(kept) == small_model.unread("a red square") == ""


def test_without_guidance_no_empty_prompt_is_encoded(small_model: AnimateDiffModel) -> None:
    noise = torch.randn(1, *small_model.latent_shape, generator=torch.Generator().manual_seed(0))
    context = small_model.encode_prompts([PROMPT])
    small_model.release()
    plain = small_model.sample(context, noise, guidance_scale=1.0)
    assert small_model._text_encoder._loaded is None
    near = small_model.sample(context, noise, guidance_scale=1.0 + 1e-6)
    torch.testing.assert_close(plain, near, rtol=1e-3, atol=1e-4)


def test_the_denoiser_is_in_half_precision_and_latents_in_fp32(
    base_folder: Path, adapter_folder: Path
) -> None:
    shape = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
    backbone = AnimateDiff(model=str(base_folder), motion_adapter=str(adapter_folder), **shape)
    model = backbone.load(Placement(CPU, torch.bfloat16))
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}
    video = model.encode_videos(torch.rand(1, 3, SHAPE.frames, SHAPE.height, SHAPE.width))
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    drawn = model.sample(
        model.encode_prompts([PROMPT]), noise, clean=video, strength=0.5, num_inference_steps=4
    )
    assert video.dtype == drawn.dtype == torch.float32 and drawn.isfinite().all()
