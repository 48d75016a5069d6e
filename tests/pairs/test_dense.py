"""Dense: one clip and one eta with two noises, at the noise level that the first step expects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_small
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler
from pydantic import ValidationError
from small_cogvideox import load_small_cogvideox, save_small_cogvideox
from small_wan import load_small_wan, save_small_wan
from test_contracts import Brighter
from torch import Generator, Tensor, nn

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.segments import preference
from dpo_video.errors import UserError
from dpo_video.pairs.dense import Dense
from dpo_video.strategies import Labeler, VideoModel
from dpo_video.testing import check_pairs
from dpo_video.types import Clip, Pair


def made(
    model: AnimateDiffModel,
    clip: Clip,
    seed: int = 0,
    labeler: Labeler | None = None,
    **options: Any,
) -> Pair:
    return Dense(**options)(clip, model, labeler, Generator().manual_seed(seed))


@contextmanager
def calls(model: AnimateDiffModel) -> Iterator[list[dict[str, Any]]]:
    """The arguments of `sample`."""
    seen: list[dict[str, Any]] = []
    original = model.sample

    def spy(context: Any, noise: Tensor, **options: Any) -> Tensor:
        seen.append({"noise": noise, **options})
        return original(context, noise, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "sample", spy)
        yield seen


def test_the_builder_passes_the_contract_with_and_without_a_labeler(
    small_model: AnimateDiffModel, clip: Clip
) -> None:
    check_pairs(Dense(), small_model, clip=clip)
    check_pairs(Dense(eta=(1.0, 1.0)), small_model, clip=clip, labeler=Brighter())


def test_both_videos_share_clip_and_eta_but_not_the_noise(
    small_model: AnimateDiffModel, clip: Clip
) -> None:
    with calls(small_model) as seen:
        pair = made(small_model, clip)
    (call,) = seen  # one call: same kernels, same precision
    assert clip.video is not None
    encoded = small_model.encode_videos(clip.video[None])[0]
    assert torch.equal(call["clean"][0], encoded) and torch.equal(call["clean"][1], encoded)
    assert call["strength"] == small_model.strength_at(pair.strength)
    one, other = call["noise"].flatten(1)
    assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 0.2
    assert (pair.region == 1).all()
    assert pair.prompt == clip.caption and pair.source == clip.name


def test_eta_is_uniform_on_its_range(small_model: AnimateDiffModel, clip: Clip) -> None:
    etas = torch.tensor(
        [made(small_model, clip, seed, num_inference_steps=2).strength for seed in range(40)]
    )
    assert etas.min() >= 0.65 and etas.max() <= 0.8
    assert etas.min() < 0.68 and etas.max() > 0.77 and len(etas.unique()) == 40
    assert made(small_model, clip, eta=(0.5, 0.5)).strength == 0.5


def test_options_reach_the_sampler(small_model: AnimateDiffModel, clip: Clip) -> None:
    with calls(small_model) as seen:
        made(small_model, clip, num_inference_steps=5, guidance_scale=1.5)
    assert seen[0]["num_inference_steps"] == 5 and seen[0]["guidance_scale"] == 1.5


@pytest.mark.parametrize(
    ("scheduler", "starts"),
    [
        (
            DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear"),
            (445, 569, 638),
        ),
        (
            CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=True),
            (358, 492, 567),
        ),
    ],
    ids=["AnimateDiff", "CogVideoX-2B"],
)
def test_eta_is_matched_by_signal_and_noise(
    small_folder: Path, scheduler: Any, starts: tuple[int, ...]
) -> None:
    model = load_small(small_folder)
    model.scheduler, model._alphas = scheduler, scheduler.alphas_cumprod
    counts = [round(1000 * model.strength_at(eta, 1000)) for eta in (0.65, 0.75, 0.8)]
    assert [count - 1 for count in counts] == list(starts)


@pytest.mark.parametrize("family", ["animatediff", "cogvideox", "wan"])
def test_the_clip_is_noised_to_eta_in_every_family(
    family: str, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: VideoModel
    if family == "animatediff":
        model = load_small(small_folder)
    elif family == "cogvideox":
        model = load_small_cogvideox(save_small_cogvideox(tmp_path))
    else:
        model = load_small_wan(save_small_wan(tmp_path))
    noised = model.add_noise
    levels: list[float] = []

    def level(timestep: Tensor) -> float:
        """Share of noise: signal to noise is `(1 - level) : level`."""
        one = torch.ones(1, *model.latent_shape)
        signal, noise = (
            noised(*both, timestep[:1]).mean().item() for both in ((one, 0 * one), (0 * one, one))
        )
        return noise / (signal + noise)

    def spy(clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        levels.append(level(timestep))
        return noised(clean, noise, timestep)

    monkeypatch.setattr(model, "add_noise", spy)
    shape = model.shape
    video = torch.rand(3, shape.frames, shape.height, shape.width)
    clip = Clip(name="clip", caption="a red square", video=video)
    steps = 40
    for eta in (0.65, 0.8):
        levels.clear()
        Dense(eta=(eta, eta), num_inference_steps=steps, guidance_scale=1)(
            clip, model, None, Generator().manual_seed(0)
        )
        assert eta - 0.06 < levels[0] <= eta  # the first step with no more noise


def test_a_higher_eta_leaves_less_of_the_clip(small_model: AnimateDiffModel, clip: Clip) -> None:
    assert clip.video is not None
    encoded = small_model.encode_videos(clip.video[None])[0]

    def distance(eta: float) -> float:
        pairs = [
            made(small_model, clip, seed, eta=(eta, eta), num_inference_steps=10)
            for seed in range(3)
        ]
        return sum((video - encoded).norm().item() for p in pairs for video in (p.first, p.second))

    assert distance(0.1) < distance(0.5) < distance(0.9)


def test_the_labeler_decides_the_preference(small_model: AnimateDiffModel, clip: Clip) -> None:
    assert (made(small_model, clip).preference == 0).all()
    pair = made(small_model, clip, labeler=Brighter(), seconds=0.25)
    expected = preference(
        Brighter(), small_model, clip.caption, pair.first, pair.second, seconds=0.25
    )
    assert torch.equal(pair.preference, expected) and pair.preference.any()
    assert torch.equal(pair.first, made(small_model, clip).first)  # it changes nothing else


@pytest.mark.parametrize("eta", [(0.0, 0.5), (0.5, 1.1), (0.8, 0.65)])
def test_an_invalid_range_is_refused(eta: tuple[float, float]) -> None:
    with pytest.raises(ValidationError):
        Dense(eta=eta)


def test_a_clip_without_a_video_is_refused(small_model: AnimateDiffModel) -> None:
    with pytest.raises(UserError, match=r"need real videos.*--clips DIR"):
        made(small_model, Clip(name="prompt", caption="a red square"))


# --- the level that sampling starts from -----------------------------------------------------


class Perfect(nn.Module):
    """Predicts the target of the noise that was drawn, at the given timestep."""

    def __init__(self, model: AnimateDiffModel, clean: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.model, self.clean, self.noise = model, clean, noise
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, noisy: Tensor, timestep: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        self.seen.append((noisy, timestep))
        times = len(noisy) // len(self.clean)  # guidance runs both halves at once
        clean, noise = (x.repeat(times, 1, 1, 1, 1) for x in (self.clean, self.noise))
        return (self.model.target(clean, noise, timestep),)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.05, 0.65, 0.72, 1.0])
def test_a_perfect_denoiser_recovers_the_clip(
    small_model: AnimateDiffModel, clip: Clip, prediction: str, spacing: str, eta: float
) -> None:
    """It does so only if the clip is noised to exactly the level of the first step.

    The predicted noise is the one drawn, whatever the step: at another level than the step's, what
    is left of it stays in the video.
    """
    small_model.scheduler = DDIMScheduler.from_config(
        small_model.scheduler.config, prediction_type=prediction, timestep_spacing=spacing
    )
    assert clip.video is not None
    clean = small_model.encode_videos(clip.video[None]).expand(2, -1, -1, -1, -1)
    noise = torch.randn(clean.shape, generator=Generator().manual_seed(0))
    denoiser = Perfect(small_model, clean, noise)
    recovered = small_model.sample(
        small_model.encode_prompts([clip.caption] * 2),
        noise,
        denoiser=denoiser,
        clean=clean,
        strength=eta,
        num_inference_steps=20,
    )
    noisy, timestep = denoiser.seen[0]
    assert len(denoiser.seen) == round(eta * 20)
    torch.testing.assert_close(noisy[:2], small_model.add_noise(clean, noise, timestep[:2]))
    torch.testing.assert_close(recovered, clean, rtol=0, atol=2e-4)
