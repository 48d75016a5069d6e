"""The judge's recipe, its accuracy as shipped, and the features that it provides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.tiny.features import video_features
from benchmarks.tiny.frechet import frechet_distance
from benchmarks.tiny.judge_recipe import (
    CORRUPTIONS,
    INTACT,
    RUINED,
    blur,
    brokenness,
    corrupt,
    draw_frames,
    measure,
    real_clips,
    train,
)
from benchmarks.tiny.quality import breaks_up
from dpo_video.support.rng import generator
from dpo_video.tiny.judge import BROKEN, FEATURES, Judge, load_judge

Clips = tuple[torch.Tensor, list[str]]


@pytest.fixture(scope="module")
def clips() -> Clips:
    return real_clips(48, "test", "judge")


@pytest.fixture(scope="module")
def others() -> torch.Tensor:
    return video_features(real_clips(48, "test", "others")[0])


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return measure(load_judge(), clips=48, frames=160)


@pytest.mark.parametrize("head", ["color", "shape", "background"])
def test_right_on_held_out_clips(head: str, measured: dict[str, Any]) -> None:
    assert measured["accuracy"][head] >= 0.98


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_confidence_falls_with_corruption(name: str, measured: dict[str, Any]) -> None:
    rows = measured["corrupted"][name]
    damage, right, rejected = (
        [row[key] for row in rows] for key in ("damage", "right", "rejected")
    )
    assert damage == sorted(damage)
    assert right == sorted(right, reverse=True)
    # Some corruptions change a shape slightly even at strength 0.
    assert right[0] > 0.85
    assert right[-1] < 0.5
    assert rejected[0] < 0.1 < 0.4 < rejected[-1]


def test_an_unchanged_image_has_no_damage() -> None:
    frames = draw_frames(8, generator("test", "frames"))
    picture = frames.paint(frames.coverage)
    assert frames.damage(picture).abs().max() < 1e-6
    assert brokenness(torch.tensor([0.0, INTACT, (INTACT + RUINED) / 2, RUINED, 9.0])).tolist() == [
        0, 0, pytest.approx(0.5), 1, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_return_coverages(name: str) -> None:
    frames = draw_frames(8, generator("test", "frames"))
    found = CORRUPTIONS[name](frames.coverage, torch.linspace(0, 1, 8), generator("test", name))
    assert found.shape == frames.coverage.shape
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6


def test_half_of_the_training_frames_are_undamaged() -> None:
    frames = draw_frames(200, generator("test", "half"))
    damage = frames.damage(frames.paint(corrupt(frames, generator("test", "half"))))
    assert 0.4 < (damage == 0).float().mean() < 0.7


def test_blur_keeps_the_mean_and_has_the_given_width() -> None:
    point = torch.zeros(2, 1, 65, 65)
    point[:, :, 32, 32] = 1
    blurred = blur(point, torch.tensor([1.0, 3.0]))
    assert torch.allclose(blurred.sum(dim=(1, 2, 3)), torch.ones(2))
    x = torch.arange(65) - 32.0
    deviation = (blurred.sum(dim=(1, 2)) * x**2).sum(dim=1).sqrt()
    assert torch.allclose(deviation, torch.tensor([1.0, 3.0]), rtol=0.02)


def test_training_is_repeatable() -> None:
    first, second = (train(2, 8, Console(quiet=True), clips=4) for _ in range(2))
    assert isinstance(first, Judge)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_features_of_real_clips_are_standardized(clips: Clips) -> None:
    features = video_features(clips[0])
    assert features.shape == (48, 2 * FEATURES)
    assert features.mean().abs() < 0.2
    assert 0.8 < features.std() < 1.2


def test_the_distance_detects_temporal_errors(clips: Clips, others: torch.Tensor) -> None:
    videos, _ = clips
    shuffled = videos.clone()
    # Every frame is real, but every second one belongs to another clip.
    shuffled[:, :, 1::2] = videos.roll(1, dims=0)[:, :, 1::2]
    change = slice(FEATURES, None)
    floor = frechet_distance(video_features(videos)[:, change], others[:, change])
    found = frechet_distance(video_features(shuffled)[:, change], others[:, change])
    assert found > 10 * floor


def test_the_distance_grows_with_blur(clips: Clips, others: torch.Tensor) -> None:
    videos, _ = clips
    found = []
    for width in (0.1, 1.5, 3.0):
        flat = blur(videos.transpose(1, 2).flatten(0, 1), torch.full((48 * 16,), width))
        blurred = flat.unflatten(0, (48, 16)).transpose(1, 2)
        found.append(frechet_distance(video_features(blurred), others))
    assert found == sorted(found)


def test_a_clip_breaks_up_if_over_a_quarter_of_its_frames_do() -> None:
    shapes = torch.zeros(4, 16, dtype=torch.long)
    shapes[1, :4] = 2
    shapes[2, :5] = 2
    shapes[3] = BROKEN
    assert breaks_up(shapes).tolist() == [False, False, True, True]
