"""Wan against diffusers' own pipelines and schedulers, on all three layouts of checkpoints."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU
from diffusers import WanPipeline, WanVideoToVideoPipeline
from pydantic import ValidationError
from small_wan import OPTIONS_TI2V, TEXT_LENGTH, euler, load_small_wan, save_small_wan, unipc
from test_contracts import Brighter
from torch import Generator, Tensor, nn

from dpo_video.backbone.wan import Wan, WanModel
from dpo_video.diffusion.experts import Experts
from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.errors import UserError
from dpo_video.pairs.dense import Dense
from dpo_video.pairs.img2img import Img2Img
from dpo_video.pairs.jitter import Jitter
from dpo_video.pairs.local import Local
from dpo_video.pairs.ranked import Ranked
from dpo_video.reference.copy import Copy
from dpo_video.reference.toggle import Toggle
from dpo_video.strategies import PairBuilder, Reference
from dpo_video.testing import check_backbone_model, check_pairs, check_reference, small_videos
from dpo_video.training.objective import noised
from dpo_video.types import PairBatch

PROMPTS = ["a red square moving left slowly", "a blue star"]
BOUNDARY = 0.8
LAYOUTS: dict[str, dict[str, Any]] = {
    "2.1": {},
    "2.1 with euler": {"scheduler": euler},
    "ti2v": {"ti2v": True},
    "a14b": {"boundary_ratio": BOUNDARY},
}


class Checkpoints:
    """Folders and models of every layout, made on first use."""

    def __init__(self, folder: Path) -> None:
        self.root = folder

    def folder(self, layout: str) -> Path:
        folder = self.root / layout.replace(" ", "-")
        if not folder.exists():
            options = dict(LAYOUTS[layout])
            scheduler: Callable[[], Any] = options.pop("scheduler", unipc)
            save_small_wan(folder, scheduler=scheduler(), **options)
        return folder

    def load(self, layout: str, **options: Any) -> WanModel:
        shape = OPTIONS_TI2V if layout == "ti2v" else {}
        return load_small_wan(self.folder(layout), **{**shape, **options})

    def pipeline(self, layout: str) -> Any:
        pipeline = WanPipeline.from_pretrained(self.folder(layout))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def model(checkpoints: Checkpoints) -> WanModel:
    return checkpoints.load("2.1")


def drawn(model: WanModel, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=Generator().manual_seed(seed))


class Perfect(nn.Module):
    """Predicts the true flow from a clip to the noise."""

    def __init__(self, flow: Tensor) -> None:
        super().__init__()
        self.flow = flow
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, noisy: Tensor, timestep: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        self.seen.append((noisy, timestep))
        return (self.flow,)


# --- against diffusers -----------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampling_from_noise_equals_the_pipeline(
    checkpoints: Checkpoints, layout: str, guidance_scale: float
) -> None:
    model, pipeline = checkpoints.load(layout), checkpoints.pipeline(layout)
    noise = drawn(model, 2)
    call = {
        "prompt": PROMPTS, "num_frames": model.shape.frames, "height": model.shape.height,
        "width": model.shape.width, "num_inference_steps": 6, "guidance_scale": guidance_scale,
        "latents": noise, "max_sequence_length": TEXT_LENGTH,
    }  # fmt: skip
    theirs = pipeline(**call, output_type="latent").frames
    ours = model.sample(
        model.encode_prompts(PROMPTS), noise, num_inference_steps=6, guidance_scale=guidance_scale
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    pixels = pipeline(**call, output_type="pt").frames.transpose(1, 2)
    torch.testing.assert_close(model.decode_videos(ours), pixels, rtol=1e-3, atol=1e-4)


def test_each_expert_has_its_guidance_scale_as_in_the_pipeline(checkpoints: Checkpoints) -> None:
    model = checkpoints.load("a14b", guidance_2=2.0)
    noise = drawn(model, 1)
    theirs = checkpoints.pipeline("a14b")(
        PROMPTS[0], num_frames=5, height=16, width=16, num_inference_steps=6, guidance_scale=5.0,
        guidance_scale_2=2.0, latents=noise, max_sequence_length=TEXT_LENGTH, output_type="latent",
    ).frames  # fmt: skip
    ours = model.sample(model.encode_prompts(PROMPTS[:1]), noise, num_inference_steps=6)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["2.1", "2.1 with euler"])
def test_sampling_from_a_clip_equals_the_video_to_video_pipeline(
    checkpoints: Checkpoints, layout: str
) -> None:
    model, parts = checkpoints.load(layout), checkpoints.pipeline(layout).components
    pipeline = WanVideoToVideoPipeline(
        **{name: parts[name] for name in
           ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")}
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    clean, noise = drawn(model, 1, seed=1), drawn(model, 1)
    pipeline.scheduler.set_timesteps(8)
    start = pipeline.scheduler.sigmas[2]
    theirs = pipeline(  # it cleans prompts with ftfy, installed or not
        prompt_embeds=model.encode_prompts(PROMPTS[:1])["prompt_embeds"],
        negative_prompt_embeds=model.encode_prompts([""])["prompt_embeds"],
        height=16, width=16, num_inference_steps=8, guidance_scale=3.0, strength=0.75,
        latents=(1 - start) * clean + start * noise, output_type="latent",
    ).frames  # fmt: skip
    ours = model.sample(
        model.encode_prompts(PROMPTS[:1]),
        noise,
        clean=clean,
        strength=0.75,
        num_inference_steps=8,
        guidance_scale=3.0,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_noise_and_target_equal_the_schedulers(model: WanModel) -> None:
    clean, noise = drawn(model, 3, seed=1), drawn(model, 3)
    scheduler = unipc()
    scheduler.set_timesteps(8)
    indices = torch.tensor([0, 3, 7])
    timestep = 1000 * scheduler.sigmas[indices]
    noisy = model.add_noise(clean, noise, timestep)
    expected = scheduler.add_noise(clean, noise, scheduler.timesteps[indices])
    torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-5)
    other = euler()
    other.set_timesteps(8)
    expected = other.scale_noise(clean, other.timesteps[indices], noise)
    torch.testing.assert_close(
        model.add_noise(clean, noise, other.timesteps[indices]),
        expected,
        rtol=1e-5,
        atol=1e-5,
    )
    # From the target, the scheduler computes the clip.
    for step in range(3):
        scheduler.set_begin_index(int(indices[step]))
        scheduler._init_step_index(scheduler.timesteps[indices[step]])
        found = scheduler.convert_model_output(
            model.target(clean, noise, timestep)[step], sample=noisy[step]
        )
        torch.testing.assert_close(found, clean[step], rtol=1e-3, atol=1e-4)


def test_noise_and_network_agree_on_the_timestep(model: WanModel) -> None:
    """LocalDPO's train_wanx21.py adds noise with a scheduler whose flow sigmas are never set: the
    network gets timestep 999 for latents with 1% noise, and 0 for latents with 157 times noise."""
    clean, noise = torch.zeros(1, 4, 2, 2, 2), torch.ones(1, 4, 2, 2, 2)
    for timestep in (0.0, 250.0, 999.0):
        noisy = model.add_noise(clean, noise, torch.tensor([timestep]))
        assert noisy.unique().item() == pytest.approx(timestep / 1000)
    as_published = unipc().add_noise(clean, noise, torch.tensor([999]))
    assert as_published.max() < 0.011


@pytest.mark.parametrize("layout", ["2.1", "ti2v"])
def test_latents_are_standardized(checkpoints: Checkpoints, layout: str) -> None:
    model, vae = checkpoints.load(layout), checkpoints.pipeline(layout).vae
    videos = small_videos(2, model.shape.frames, model.shape.height, model.shape.width)
    raw = vae.encode(2 * videos - 1).latent_dist.mode()
    for channel in range(raw.shape[1]):
        expected = (raw[:, channel] - vae.config.latents_mean[channel]) / vae.config.latents_std[
            channel
        ]
        torch.testing.assert_close(
            model.encode_videos(videos)[:, channel], expected, rtol=1e-4, atol=1e-5
        )
    decoded = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    latents = model.encode_videos(videos)
    torch.testing.assert_close(model.decode_videos(latents), decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "prompt",
    ["a red square", "  a   red\nsquare &amp;amp; a star ", "", "a red square moving left " * 5],
)
def test_prompts_are_encoded_as_in_the_pipeline(
    checkpoints: Checkpoints, model: WanModel, prompt: str
) -> None:
    theirs, _ = checkpoints.pipeline("2.1").encode_prompt(
        [prompt, "a blue star"],
        do_classifier_free_guidance=False,
        max_sequence_length=TEXT_LENGTH,
        device=CPU,
    )
    ours = model.encode_prompts([prompt, "a blue star"])["prompt_embeds"]
    assert ours.shape == (2, TEXT_LENGTH, 8)
    torch.testing.assert_close(ours, theirs)
    assert ours[1, :4].any(dim=1).all() and not ours[1, 4:].any()


def test_the_end_that_is_not_read_is_named(model: WanModel) -> None:
    prompt = "a red square " * 40 + "moving left"
    end = model.unread(prompt)
    kept = prompt.removesuffix(end)
    assert end.endswith("moving left") and kept != prompt
    both = [model.encode_prompts([text])["prompt_embeds"] for text in (prompt, kept + "a star")]
    torch.testing.assert_close(*both, rtol=0, atol=0)
    assert model.unread(kept) == model.unread("a red square") == ""


# --- levels ----------------------------------------------------------------------------------


def test_timesteps_are_logit_normal_and_shifted(checkpoints: Checkpoints) -> None:
    def quantiles(layout: str, **options: Any) -> list[float]:
        timesteps = checkpoints.load(layout, **options).sample_timesteps(
            20_000, Generator().manual_seed(0)
        )
        assert timesteps.min() > 0 and timesteps.max() <= 1000
        return timesteps.double().quantile(torch.tensor([0.1587, 0.5, 0.8413]).double()).tolist()

    # One standard deviation to both sides of the median: sigmoid(-1), sigmoid(0), sigmoid(1).
    assert quantiles("2.1") == pytest.approx([268.9, 500.0, 731.1], abs=8)
    assert quantiles("2.1", timestep_sampling="uniform") == pytest.approx(
        [158.7, 500.0, 841.3], abs=8
    )
    # 3 s / (1 + 2 s)
    shifted = [524.6, 750.0, 890.8]
    assert quantiles("2.1", timestep_shift=3.0) == pytest.approx(shifted, abs=8)
    assert quantiles("a14b") == pytest.approx(shifted, abs=8)


@pytest.mark.parametrize("sampling", ["logit_normal", "uniform"])
def test_one_experts_timesteps_are_those_of_both_on_its_side(
    checkpoints: Checkpoints, sampling: str
) -> None:
    both, high, low = (
        checkpoints.load("a14b", experts=experts, timestep_sampling=sampling).sample_timesteps(
            20_000, Generator().manual_seed(0)
        )
        for experts in ("both", "high", "low")
    )
    boundary = 1000 * BOUNDARY
    assert high.min() >= boundary > low.max()
    for part, expected in ((high, both[both >= boundary]), (low, both[both < boundary])):
        ranks = torch.tensor([0.25, 0.5, 0.75])
        assert part.quantile(ranks).tolist() == pytest.approx(
            expected.quantile(ranks).tolist(), abs=12
        )


@pytest.mark.parametrize("layout", ["2.1", "ti2v"])
def test_both_videos_get_the_same_gaussian_noise_and_timestep(
    checkpoints: Checkpoints, layout: str
) -> None:
    model = checkpoints.load(layout)
    first, second = drawn(model, 8, seed=1), drawn(model, 8, seed=2)
    batch = PairBatch(
        first=first,
        second=second,
        preference=torch.ones(8, model.latent_shape[1]),
        region=torch.ones(8, 1, *model.latent_shape[1:]),
        strength=torch.zeros(8),
        context=model.encode_prompts(["a red square"] * 8),
        keys=[str(i) for i in range(8)],
    )
    timestep = model.sample_timesteps(8, Generator().manual_seed(0))
    inputs = noised(model, batch, initial_noise(model, range(8)), timestep)
    sigma = (inputs.timestep / 1000).view(-1, 1, 1, 1, 1)
    noise = (inputs.noisy - (1 - sigma) * torch.cat([first, second])) / sigma
    assert torch.equal(*inputs.timestep.chunk(2))
    torch.testing.assert_close(*noise.chunk(2), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(
        inputs.target, noise - torch.cat([first, second]), rtol=1e-2, atol=1e-3
    )
    # Uniform noise of unit variance has a fourth moment of 1.8 and a maximum of 1.74.
    one = noise.chunk(2)[0]
    assert one.std().item() == pytest.approx(1, abs=0.1) and one.abs().max() > 2.2
    assert one.pow(4).mean() > 2.2


@pytest.mark.parametrize("eta", [0.02, 0.65, 0.8, 1.0])
@pytest.mark.parametrize("layout", ["2.1", "2.1 with euler"])
def test_dense_pairs_start_at_the_first_sigma_up_to_eta(
    checkpoints: Checkpoints, layout: str, eta: float
) -> None:
    """Noised by exactly that sigma, so that the true flow leads back to the clip."""
    model = checkpoints.load(layout)
    clean, noise = drawn(model, 1, seed=1), drawn(model, 1)
    denoiser = Perfect(noise - clean)
    found = model.sample(
        model.encode_prompts(PROMPTS[:1]), noise, denoiser=denoiser, clean=clean,
        strength=model.strength_at(eta, 20), num_inference_steps=20, guidance_scale=1.0,
    )  # fmt: skip
    scheduler = copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas[:-1].tolist()
    expected = [sigma for sigma in sigmas if sigma <= eta] or sigmas[-1:]
    assert len(denoiser.seen) == len(expected)
    noisy, timestep = denoiser.seen[0]
    torch.testing.assert_close(
        noisy, model.add_noise(clean, noise, torch.tensor([1000 * expected[0]]))
    )
    assert timestep.item() == pytest.approx(1000 * expected[0], abs=1)
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-3)


# --- videos ----------------------------------------------------------------------------------


def test_latent_frames_match_the_vae(checkpoints: Checkpoints) -> None:
    model = checkpoints.load("2.1", frames=13)
    video = small_videos(1, 13, 16, 16)
    latents = model.encode_videos(video)
    assert latents.shape[2] == 4
    for frame in (0, 1, 4, 5, 8, 9, 12):
        changed = video.clone()
        changed[:, :, frame] = 1 - changed[:, :, frame]
        differ = (model.encode_videos(changed) != latents).any(dim=(0, 1, 3, 4)).nonzero()
        assert model.latent_frames(slice(frame, frame + 1)).start == differ.min()
    seconds = [slice(0, 4), slice(4, 8), slice(8, 13)]
    assert [model.latent_frames(second) for second in seconds] == [
        slice(0, 2), slice(1, 3), slice(2, 4),
    ]  # fmt: skip


def test_a_full_region_equals_no_region(model: WanModel) -> None:
    clean, noise = drawn(model, 1, seed=1), drawn(model, 1)
    context = model.encode_prompts(PROMPTS[:1])
    options: dict[str, Any] = {"clean": clean, "strength": 0.75, "num_inference_steps": 8}
    whole = model.sample(context, noise, region=torch.ones(1, 1, *clean.shape[2:]), **options)
    torch.testing.assert_close(whole, model.sample(context, noise, **options))
    nothing = model.sample(context, noise, region=torch.zeros(1, 1, *clean.shape[2:]), **options)
    assert torch.equal(nothing, clean)


@pytest.mark.parametrize(
    "builder",
    [
        Local(num_inference_steps=4),
        Jitter(num_inference_steps=2),
        Dense(num_inference_steps=4),
        Ranked(samples=2, num_inference_steps=2),
        Img2Img(chosen="clip", num_inference_steps=7),
    ],
    ids=lambda builder: type(builder).__name__,
)
def test_every_kind_of_pairs(model: WanModel, builder: PairBuilder) -> None:
    check_pairs(builder, model, labeler=Brighter())


# --- experts ---------------------------------------------------------------------------------


def test_the_timestep_selects_the_expert(checkpoints: Checkpoints) -> None:
    model = checkpoints.load("a14b")
    assert isinstance(model.denoiser, Experts)
    noisy, timestep = drawn(model, 3), torch.tensor([100.0, 1000 * BOUNDARY, 799.9])
    context = model.encode_prompts(["a red square"] * 3)
    together = model.predict(model.denoiser, noisy, timestep, context)
    for row, name in enumerate(("transformer_2", "transformer", "transformer_2")):
        alone = model.predict(
            getattr(model.denoiser, name),
            noisy[row : row + 1],
            timestep[row : row + 1],
            {"prompt_embeds": context["prompt_embeds"][row : row + 1]},
        )
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("experts", ["both", "high", "low"])
def test_only_the_chosen_experts_train(checkpoints: Checkpoints, experts: str) -> None:
    model = checkpoints.load("a14b", experts=experts)
    owners = {name.split(".")[0] for name in model.lora_targets()}
    both = {"transformer", "transformer_2"}
    assert owners == {"both": both, "high": {"transformer"}, "low": {"transformer_2"}}[experts]
    # Two blocks of self- and cross-attention with four projections each.
    assert len(model.lora_targets()) == 2 * 2 * 4 * len(owners)


class Scaled(nn.Module):
    """A network of one weight and one adapter weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.layer = nn.ModuleDict({"lora_A": nn.Linear(1, 1)})

    def forward(self, noisy: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (noisy * self.scale,)


def test_only_the_expert_in_use_is_on_the_device() -> None:
    experts = Experts(Scaled(), Scaled(), boundary=875.0, park=True)
    on_device = torch.zeros(2, 1, device="meta")  # stands for a GPU
    experts(on_device, torch.tensor([100.0, 200.0]), on_device)
    devices = {name: parameter.device.type for name, parameter in experts.named_parameters()}
    assert devices["transformer.scale"] == "cpu" and devices["transformer_2.scale"] == "meta"
    with pytest.raises(UserError, match=r"both experts at once.*train\.batch_size=1"):
        experts(on_device, torch.tensor([100.0, 900.0]), on_device)


@pytest.mark.parametrize("reference", [Toggle(), Copy()])
def test_references_cover_both_experts(checkpoints: Checkpoints, reference: Reference) -> None:
    check_reference(reference, checkpoints.load("a14b"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_contract(checkpoints: Checkpoints, layout: str) -> None:
    check_backbone_model(checkpoints.load(layout))


# --- what is refused -------------------------------------------------------------------------


def test_frame_counts_that_the_vae_does_not_take_are_refused() -> None:
    with pytest.raises(ValidationError, match="choose 77 or 81"):
        Wan(frames=80)


def test_sizes_that_patches_do_not_divide_are_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(UserError, match=r"backbone\.height = 48 is not a multiple of 32.*32 or 64"):
        checkpoints.load("ti2v", height=48)


def test_sizes_beyond_the_positions_of_the_model_are_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(UserError, match=r"width = 1056 .*positions.*backbone\.width=1024"):
        checkpoints.load("ti2v", width=1056)


def test_experts_of_a_model_without_experts_are_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(UserError, match="no 'high' expert"):
        checkpoints.load("2.1", experts="high")


def edited(folder: Path, copy: Path, file: str, **values: Any) -> Path:
    """A copy of a checkpoint with one configuration changed."""
    shutil.copytree(folder, copy)
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return copy


@pytest.mark.parametrize(
    ("file", "values", "sentence"),
    [
        ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}, "text-to-video one"),
        ("vae/config.json", {"z_dim": 3}, "takes 4 channels, and its VAE makes 3"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "not predict flow"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "is DDIMScheduler"),
    ],
)
def test_other_checkpoints_are_refused(
    checkpoints: Checkpoints, tmp_path: Path, file: str, values: dict[str, Any], sentence: str
) -> None:
    folder = edited(checkpoints.folder("2.1"), tmp_path / "copy", file, **values)
    with pytest.raises(UserError, match=sentence):
        load_small_wan(folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "scheduler"])
def test_a_missing_part_is_named(checkpoints: Checkpoints, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints.folder("2.1"), folder, ignore=shutil.ignore_patterns(part))
    with pytest.raises(UserError, match=rf"Cannot load the {part} of .*backbone\.model"):
        load_small_wan(folder)
