from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import CogVideoXPipeline, CogVideoXVideoToVideoPipeline
from PIL import Image
from small_cogvideox import (
    CPU,
    OPTIONS,
    TEXT_LENGTH,
    Layout,
    load_small_cogvideox,
    save_small_cogvideox,
    stock_pipeline,
)
from test_contracts import Brighter
from torch import Generator, Tensor, nn

from dpo_video.backbone.animatediff import AnimateDiff
from dpo_video.backbone.cogvideox import CogVideoX, CogVideoXModel
from dpo_video.data.store import Manifest, PairStore
from dpo_video.data.video_writer import write_video
from dpo_video.errors import UserError
from dpo_video.loss.global_ import Global
from dpo_video.pairs.dense import Dense
from dpo_video.pairs.folder import Folder
from dpo_video.pairs.img2img import Img2Img
from dpo_video.pairs.jitter import Jitter
from dpo_video.pairs.local import Local
from dpo_video.pairs.ranked import Ranked
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.strategies import PairBuilder
from dpo_video.testing import check_backbone_model, check_pairs, small_videos
from dpo_video.training.run import train
from dpo_video.types import Pair, Placement

PROMPT = "a red square moving left slowly"


class Bench:
    """One layout: its folder, the model, and diffusers' pipeline of the same files."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout = layout
        self.folder = save_small_cogvideox(folder, layout)
        self.model = load_small_cogvideox(self.folder)
        self.pipeline: CogVideoXPipeline = stock_pipeline(self.folder)


@pytest.fixture(scope="module", params=get_args(Layout))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("cogvideox"), request.param)


@pytest.fixture
def model(bench: Bench) -> CogVideoXModel:
    return bench.model


def drawn(model: CogVideoXModel, count: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def theirs(bench: Bench, noise: Tensor, **options: Any) -> Any:
    return bench.pipeline(
        PROMPT,
        num_frames=OPTIONS["frames"],
        height=OPTIONS["height"],
        width=OPTIONS["width"],
        max_sequence_length=TEXT_LENGTH,
        **{"guidance_scale": 3.0, "latents": noise.transpose(1, 2), "output_type": "pt", **options},
    ).frames


# --- numbers against diffusers -----------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("num_inference_steps", [4, 7])  # 7 does not divide 1000
def test_sampling_from_noise_equals_the_pipeline(
    bench: Bench, num_inference_steps: int, spacing: str
) -> None:
    model, noise = bench.model, drawn(bench.model)
    for scheduler in (model.scheduler, bench.pipeline.scheduler):
        scheduler.register_to_config(timestep_spacing=spacing)
    try:
        expected = theirs(
            bench, noise, num_inference_steps=num_inference_steps, output_type="latent"
        )
        ours = model.sample(
            model.encode_prompts([PROMPT]),
            noise,
            num_inference_steps=num_inference_steps,
            guidance_scale=3.0,
        )
    finally:
        for scheduler in (model.scheduler, bench.pipeline.scheduler):
            scheduler.register_to_config(timestep_spacing="trailing")
    torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_dynamic_guidance_and_pixels_equal_the_pipeline(bench: Bench) -> None:
    model = load_small_cogvideox(bench.folder, dynamic_guidance=True)
    noise = drawn(model)
    expected = theirs(bench, noise, num_inference_steps=3, use_dynamic_cfg=True)
    ours = model.sample(
        model.encode_prompts([PROMPT]), noise, num_inference_steps=3, guidance_scale=3.0
    )
    torch.testing.assert_close(
        model.decode_videos(ours).transpose(1, 2), expected, rtol=1e-4, atol=1e-4
    )
    plain = model.__class__.sample(
        bench.model, model.encode_prompts([PROMPT]), noise, num_inference_steps=3
    )
    assert not torch.allclose(plain, ours, atol=1e-2)
    asked = bench.model.sample(
        model.encode_prompts([PROMPT]), noise, num_inference_steps=3, guidance_scale=3.0,
        dynamic_guidance=True,
    )  # fmt: skip
    assert torch.equal(asked, ours)


@pytest.mark.parametrize("steps", [3, 50])
def test_the_dynamic_scale_of_each_step_is_the_pipelines(bench: Bench, steps: int) -> None:
    scales: list[float] = []

    def keep(pipeline: Any, step: int, timestep: int, values: dict[str, Any]) -> dict[str, Any]:
        scales.append(pipeline.guidance_scale)
        return values

    theirs(
        bench, drawn(bench.model), num_inference_steps=steps, guidance_scale=6.0,
        use_dynamic_cfg=True, callback_on_step_end=keep, output_type="latent",
    )  # fmt: skip
    assert len(set(scales)) > 1
    assert bench.model._guidance_scales(6.0, steps, True) == scales
    assert bench.model._guidance_scales(6.0, steps, None) == [6.0] * steps


def test_prompts_are_encoded_as_in_the_pipeline(bench: Bench) -> None:
    expected, _ = bench.pipeline.encode_prompt(
        [PROMPT, ""], do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
    )
    ours = bench.model.encode_prompts([PROMPT, ""])["prompt_embeds"]
    torch.testing.assert_close(ours, expected)


def test_the_end_that_is_not_read_is_named(bench: Bench) -> None:
    prompt = "a red square " * 80 + "moving left"
    end = bench.model.unread(prompt)
    kept = prompt.removesuffix(end)
    assert end.endswith("moving left") and kept != prompt
    both = [
        bench.model.encode_prompts([text])["prompt_embeds"] for text in (prompt, kept + "a star")
    ]
    torch.testing.assert_close(*both, rtol=0, atol=0)
    assert bench.model.unread(kept) == bench.model.unread("a red square") == ""


def test_noise_and_target_equal_the_schedulers(bench: Bench) -> None:
    model, scheduler = bench.model, bench.pipeline.scheduler
    clean, noise = drawn(model, 3, seed=1), drawn(model, 3, seed=2)
    timestep = torch.tensor([0.0, 500.0, 999.0])
    torch.testing.assert_close(
        model.add_noise(clean, noise, timestep), scheduler.add_noise(clean, noise, timestep.long())
    )
    torch.testing.assert_close(
        model.target(clean, noise, timestep), scheduler.get_velocity(clean, noise, timestep.long())
    )
    # Zero terminal SNR: no signal at the last timestep.
    assert torch.equal(model.add_noise(clean, noise, timestep)[2], noise[2])


def test_videos_are_encoded_as_in_the_video_to_video_pipeline(bench: Bench) -> None:
    model, videos = bench.model, small_videos(1, 9, 16, 32)
    stock = CogVideoXVideoToVideoPipeline(**bench.pipeline.components)
    frames = [
        Image.fromarray((255 * frame).round().byte().permute(1, 2, 0).numpy())
        for frame in videos[0].transpose(0, 1)
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])) / 255
    stock.vae.register_to_config(invert_scale_latents=bench.layout == "1.5")
    prepared = stock.video_processor.preprocess_video(frames, height=16, width=32)
    expected = stock.vae.encode(prepared).latent_dist.mode() * stock.vae_scaling_factor_image
    ours = model.encode_videos(pixels.permute(3, 0, 1, 2)[None])
    padding = ours.shape[2] - expected.shape[2]
    assert padding == (1 if bench.layout == "1.5" else 0)
    torch.testing.assert_close(ours[:, :, padding:], expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(ours[:, :, i], ours[:, :, padding]) for i in range(padding))


def test_latents_are_scaled_by_the_factor_and_back(model: CogVideoXModel) -> None:
    """Multiplied in encoding and divided in decoding."""
    videos = small_videos(1, 9, 16, 32)
    factor = model.vae.config.scaling_factor
    assert factor != 1
    bare = model.vae.encode(2 * videos - 1).latent_dist.mean
    latents = model.encode_videos(videos)
    torch.testing.assert_close(latents[:, :, -bare.shape[2] :], bare * factor)
    decoded = (model.vae.decode(bare).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode_videos(latents), decoded, rtol=1e-4, atol=1e-5)


# --- the family's own rules --------------------------------------------------------------------


def test_the_contract(model: CogVideoXModel) -> None:
    check_backbone_model(model)


def test_release_frees_everything_but_the_denoiser(small_cogvideox: Path) -> None:
    before = count_weights()
    model = load_small_cogvideox(small_cogvideox)
    context = model.encode_prompts([PROMPT])
    model.decode_videos(model.sample(context, drawn(model), num_inference_steps=1))
    parts = weakref.ref(model.vae), weakref.ref(model.text_encoder)
    model.release()
    assert [part() for part in parts] == [None, None]
    # The encoded empty prompt is kept, so that sampling loads nothing.
    model.sample(context, drawn(model), num_inference_steps=1)
    assert count_weights() - before == sum(1 for _ in model.denoiser.parameters())


def count_weights() -> int:
    gc.collect()
    return sum(type(thing) is nn.Parameter for thing in gc.get_objects())


def test_latent_k_covers_frames_4k_minus_3_to_4k(model: CogVideoXModel) -> None:
    padding = model.latent_shape[1] - 3
    assert model.latent_frames(slice(0, 1)) == slice(0, 1 + padding)
    assert model.latent_frames(slice(0, 9)) == slice(0, 3 + padding)
    for frame in range(1, 9):
        latent = (frame + 3) // 4 + padding
        assert model.latent_frames(slice(frame, frame + 1)) == slice(latent, latent + 1)
    assert model.latent_frames(slice(4, 6)) == slice(1 + padding, 3 + padding)


def test_per_frame_sampling_is_independent_between_frames(model: CogVideoXModel) -> None:
    context, noise = model.encode_prompts([PROMPT]), drawn(model)
    changed = noise.clone()
    changed[:, :, -1] += 1
    frames = [
        model.sample(context, each, per_frame=True, num_inference_steps=2)
        for each in (noise, changed)
    ]
    patch = 2 if model.latent_shape[1] == 4 else 1
    assert torch.equal(frames[0][:, :, :-patch], frames[1][:, :, :-patch])
    together = [model.sample(context, each, num_inference_steps=2) for each in (noise, changed)]
    assert not torch.equal(together[0][:, :, :-patch], together[1][:, :, :-patch])


def test_lora_targets_the_attention_with_the_papers_rank(model: CogVideoXModel) -> None:
    blocks = len(model.denoiser.transformer_blocks)
    names = ("to_q", "to_k", "to_v", "to_out.0")
    assert sorted(model.lora_targets()) == sorted(
        f"transformer_blocks.{i}.attn1.{name}" for i in range(blocks) for name in names
    )
    assert CogVideoX.training["rank"] == 64 and CogVideoX.training["alpha"] == 128


def test_timesteps_are_uniform(model: CogVideoXModel) -> None:
    timesteps = model.sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert timesteps.min() == 0 and timesteps.max() == 999
    assert abs(timesteps.mean().item() - 499.5) < 10 and (timesteps == timesteps.round()).all()


def test_tiling_is_enabled_on_request(bench: Bench) -> None:
    model = load_small_cogvideox(bench.folder, tiling=True)
    assert model.vae.use_tiling and not bench.model.vae.use_tiling


def own_files(folder: Path) -> Path:
    """Two pairs for `folder`, one of them with a mask and labels."""
    for side, seed in (("win", 1), ("lose", 2)):
        for name, video in zip("ab", small_videos(2, 9, 16, 32, seed=seed), strict=True):
            write_video(folder / side / f"{name}.mp4", video, OPTIONS["fps"])
    mask = np.zeros((16, 32), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    rows = [
        {"win": f"win/{n}.mp4", "lose": f"lose/{n}.mp4", "prompt": PROMPT, **more}
        for n, more in (("a", {"mask": "mask.png", "labels": [1]}), ("b", {}))
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pairs.jsonl"


BUILDERS = [
    Local(num_inference_steps=4),
    Jitter(num_inference_steps=2),
    Dense(num_inference_steps=4),
    Ranked(samples=2, num_inference_steps=2),
    Img2Img(chosen="clip", num_inference_steps=7),
]


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: type(builder).__name__)
def test_every_kind_of_pairs(model: CogVideoXModel, builder: PairBuilder) -> None:
    check_pairs(builder, model, labeler=Brighter())


def test_pairs_from_own_files(model: CogVideoXModel, tmp_path: Path) -> None:
    builder = Folder(path=own_files(tmp_path))
    check_pairs(builder, model)
    masked = builder(
        next(builder.source(model, None).clips), model, None, Generator().manual_seed(0)
    )
    half = torch.zeros_like(masked.region)
    half[..., :2] = 1
    assert torch.equal(masked.region, half)


def test_in_training_both_videos_get_the_same_gaussian_noise_and_timestep(
    small_cogvideox: Path, tmp_path: Path
) -> None:
    """Pairs of two zero latents: the network's input is noise only."""
    model = load_small_cogvideox(small_cogvideox)
    store = PairStore.create(
        tmp_path / "store",
        Manifest(recipe={}, identity=model.identity, latent_shape=model.latent_shape, fps=8.0),
    )
    empty = torch.zeros(model.latent_shape)
    pair = Pair(
        first=empty,
        second=empty.clone(),
        preference=torch.ones(3),
        region=torch.ones(1, 3, 2, 4),
        prompt=PROMPT,
        source="nothing",
    )
    for _ in range(2):
        store.append(pair, model.encode_prompts([PROMPT]))
    seen: list[tuple[Tensor, Tensor]] = []
    model.denoiser.register_forward_pre_hook(
        lambda module, inputs, options: seen.append(
            (options["hidden_states"], options["timestep"])
        ),
        with_kwargs=True,
    )
    settings = TrainSettings(
        steps=12,
        batch_size=2,
        gradient_accumulation_steps=1,
        rank=2,
        alpha=4,
        validation_videos=0,
        report_to="none",
    )
    steps = train(
        model, store, Global(), Toggle(), settings, seed=0, out=tmp_path / "run",
        accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    parts = weakref.ref(model.vae), weakref.ref(model.text_encoder)
    next(steps)
    assert [part() for part in parts] == [None, None]  # only the denoiser stays in memory
    assert len(list(steps)) == 11
    noises, timesteps = [], []
    for noisy, timestep in seen:
        (winner, loser), (higher, lower) = noisy.chunk(2), timestep.chunk(2)
        assert torch.equal(winner, loser) and torch.equal(higher, lower)
        spread = (1 - model.scheduler.alphas_cumprod[higher.long()]).sqrt().float()
        noises.append(winner / spread.view(-1, 1, 1, 1, 1))
        timesteps.append(higher)
    # Reference and policy get the same inputs.
    assert all(torch.equal(noises[i], noises[i + 1]) for i in range(0, len(noises), 2))
    assert all(torch.equal(timesteps[i], timesteps[i + 1]) for i in range(0, len(timesteps), 2))
    assert len({float(timestep) for pair in timesteps for timestep in pair}) > 12
    noise = torch.cat(noises[::2]).flatten()
    assert len(noise) == 24 * empty.numel()
    assert noise.mean().abs() < 0.1 and abs(noise.std().item() - 1) < 0.1
    kurtosis = noise.pow(4).mean() / noise.square().mean().square()
    assert abs(kurtosis.item() - 3) < 0.6  # 1.8 for uniform noise


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frames": 13}, r"8k \+ 1 frames, not of 13\. Take \d+ \(--set backbone\.frames="),
        ({"height": 24}, r"height is a multiple of 16 pixels, not 24\. Take"),
        ({"width": 36}, r"width is a multiple of 16 pixels, not 36\. Take 32"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_a_suggestion(
    bench: Bench, options: dict[str, int], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        load_small_cogvideox(bench.folder, **options)


def test_sizes_beyond_the_positions_of_1_5_are_refused(bench: Bench) -> None:
    if bench.layout != "1.5":
        assert load_small_cogvideox(bench.folder, width=256).latent_shape[-1] == 32
        return
    with pytest.raises(UserError, match="positions up to a width of 240 pixels, not 256"):
        load_small_cogvideox(bench.folder, width=256)


def test_other_models_are_refused(small_folder: Path, tmp_path: Path, bench: Bench) -> None:
    with pytest.raises(UserError, match="Cannot load the transformer"):
        CogVideoX(model=str(small_folder)).load(Placement())
    with pytest.raises(UserError, match="Cannot load the unet"):
        AnimateDiff(model=str(bench.folder)).load(Placement())
    pictures = save_small_cogvideox(tmp_path, "5b", in_channels=8)
    with pytest.raises(UserError, match="image-to-video"):
        load_small_cogvideox(pictures)


def test_the_denoiser_is_in_half_precision_and_latents_in_fp32(bench: Bench) -> None:
    model = CogVideoX(model=str(bench.folder), **OPTIONS).load(Placement(CPU, torch.bfloat16))
    assert isinstance(model, CogVideoXModel)
    assert next(model.denoiser.parameters()).dtype == torch.bfloat16
    latents = model.encode_videos(small_videos(1, 9, 16, 32))
    sample = model.sample(model.encode_prompts([PROMPT]), drawn(model), num_inference_steps=2)
    assert latents.dtype == sample.dtype == torch.float32
    assert model.identity != bench.model.identity
    assert math.isfinite(model.decode_videos(sample).sum().item())
