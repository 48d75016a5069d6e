"""The procedural world: clips show what their captions describe."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from dpo_video.support.rng import generator
from dpo_video.tiny import scenes
from dpo_video.tiny.scenes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZE, SPEEDS


@pytest.fixture(scope="module")
def drawn() -> scenes.Scenes:
    return scenes.draw_scenes(72, generator("test", "scenes"))


@pytest.fixture(scope="module")
def coverage(drawn: scenes.Scenes) -> torch.Tensor:
    return scenes.coverage(drawn)


def test_the_same_generator_draws_the_same_clips() -> None:
    first, second = (scenes.draw_scenes(5, generator("test", 1)) for _ in range(2))
    assert torch.equal(scenes.render(first), scenes.render(second))
    assert first.captions() == second.captions()


def test_shapes_stay_inside_the_picture(drawn: scenes.Scenes, coverage: torch.Tensor) -> None:
    margin = torch.minimum(drawn.center, SIZE - drawn.center).amin(dim=(1, 2))
    assert (margin >= drawn.radius + 1 - 1e-3).all()
    rims = (coverage[..., 0, :], coverage[..., -1, :], coverage[..., :, 0], coverage[..., :, -1])
    touched = torch.cat(rims, dim=-1).amax(dim=(1, 2, 3)) > 0
    # Corners of other shapes reach up to 1.21 radii, so a tip may be cut off.
    within = [SHAPES.index("circle"), SHAPES.index("star")]
    assert not touched[torch.isin(drawn.shape, torch.tensor(within))].any()


def test_coverage_is_antialiased(drawn: scenes.Scenes, coverage: torch.Tensor) -> None:
    assert coverage.min() == 0
    assert coverage.max() == 1
    partial = ((coverage > 0) & (coverage < 1)).float().mean(dim=(2, 3, 4))
    # At most two pixels along an outline that is shorter than ten radii.
    assert (partial > 0).all()
    assert (partial <= 2 * 10 * drawn.radius[:, None] / SIZE**2).all()


def test_areas_are_those_of_the_outlines(drawn: scenes.Scenes, coverage: torch.Tensor) -> None:
    for index, outline in enumerate(scenes.OUTLINES.values()):
        x, y = (torch.tensor(outline or [(0.0, 0.0)])[:, axis] for axis in (0, 1))
        shoelace = (x * y.roll(-1) - y * x.roll(-1)).sum().abs() / 2
        unit = shoelace if outline else torch.tensor(torch.pi)
        chosen = drawn.shape == index
        area = coverage[chosen].sum(dim=(2, 3, 4)) / drawn.radius[chosen, None] ** 2
        # The half-pixel ramp removes area at sharp tips and adds some at inner corners.
        assert area.sub(unit).abs().max() < 0.06 * unit


@pytest.mark.parametrize("shape", ["circle", "square", "star", "cross"])
def test_the_centre_of_mass_is_the_centre(
    shape: str, drawn: scenes.Scenes, coverage: torch.Tensor
) -> None:
    chosen = drawn.shape == SHAPES.index(shape)
    error = _centre(coverage[chosen]) - drawn.center[chosen]
    assert error.abs().max() < 0.1


def test_the_centroid_of_a_triangle_is_a_sixth_of_its_radius_below_its_centre() -> None:
    drawn = scenes.draw_scenes(50, generator("test", "triangles"))
    still = torch.zeros_like(drawn.angle)
    drawn = replace(drawn, shape=torch.full((50,), SHAPES.index("triangle")), angle=still)
    error = _centre(scenes.coverage(drawn)) - drawn.center
    below = torch.tensor([0.0, (-1 + 0.75 + 0.75) / 3]) * drawn.radius[:, None, None]
    assert (error - below).abs().max() < 0.15


def test_motion_matches_the_caption(drawn: scenes.Scenes) -> None:
    steps = drawn.center.diff(dim=1)
    directions = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for name, direction in directions.items():
        chosen = steps[drawn.motion == MOTIONS.index(name)]
        along = (chosen * torch.tensor(direction)).sum(dim=-1)
        assert (along > 0).all()
        assert torch.allclose(chosen.norm(dim=-1), along, atol=1e-4)
    for name in ("spinning",):
        chosen = drawn.motion == MOTIONS.index(name)
        assert steps[chosen].abs().max() == 0
        assert (drawn.angle[chosen].diff(dim=1) > 0).all()
        assert (drawn.angle[~chosen].diff(dim=1) == 0).all()


def test_speed_matches_the_caption(drawn: scenes.Scenes) -> None:
    pace = drawn.center.diff(dim=1).norm(dim=-1)
    spin = drawn.angle.diff(dim=1) * drawn.radius[:, None]
    pace = torch.where((drawn.motion == MOTIONS.index("spinning"))[:, None], spin, pace)
    slowest, fastest = torch.tensor(list(SPEEDS.values()))[drawn.speed].T
    assert (pace.std(dim=1) < 1e-3).all()  # even
    assert (pace[:, 0] <= fastest + 1e-3).all()
    # Only a shape whose path was shortened is slower than its caption.
    room = 2 * (SIZE / 2 - drawn.radius - 1) / (scenes.FRAMES - 1)
    assert (pace[:, 0] >= torch.minimum(slowest, room) - 0.02).all()


def test_colours_match_the_caption(drawn: scenes.Scenes, coverage: torch.Tensor) -> None:
    video = scenes.render(drawn)
    fills = torch.tensor(list(COLORS.values()))[drawn.color] / 255
    inside = (coverage == 1).expand_as(video)
    assert torch.allclose(video[inside], fills[:, None, :, None, None].expand_as(video)[inside])
    palette = torch.tensor(list(BACKGROUNDS.values()))[drawn.background] / 255
    outside = (coverage == 0)[:, :, 0]
    for clip, colors, mask in zip(video.movedim(2, -1), palette, outside, strict=True):
        difference = (clip[mask][:, None] - colors).abs().amax(dim=-1).amin(dim=-1)
        assert difference.max() < 1e-6


def test_selected_frames_and_crops_equal_parts_of_the_video(drawn: scenes.Scenes) -> None:
    video = scenes.render(drawn)
    frames = torch.tensor([[3]]).expand(len(drawn), 1)
    origin = torch.tensor([8.0, 16.0]).expand(len(drawn), 1, 2)
    crop = scenes.render(drawn, frames, origin, 32)
    assert torch.allclose(crop[:, 0], video[:, 3, :, 16:48, 8:40], atol=1e-5)


def test_parse_caption_is_the_inverse_of_caption() -> None:
    captions = list(scenes.all_captions())
    assert len(set(captions)) == len(captions)
    for text in captions:
        words = scenes.parse_caption(text)
        assert words is not None
        assert (
            scenes.caption(words.shape, words.color, words.background, words.motion, words.speed)
            == text
        )


def test_parse_caption_ignores_case_and_spacing_only() -> None:
    text = scenes.caption("star", "orange", "navy", "left", "slowly")
    assert scenes.parse_caption(f"  {text.upper()}  ") == scenes.parse_caption(text)
    assert scenes.parse_caption(text.replace("star", "moon")) is None
    assert scenes.parse_caption(f"{text} at night") is None
    assert scenes.parse_caption("") is None


@pytest.mark.parametrize("n", [47, 94, 240])
def test_spread_captions_covers_every_word_evenly(n: int) -> None:
    captions = scenes.spread_captions(n)
    parsed = [words for text in captions if (words := scenes.parse_caption(text))]
    assert len(parsed) == n
    axes = {
        "shape": SHAPES, "color": COLORS, "background": BACKGROUNDS, "motion": MOTIONS,
        "speed": SPEEDS,
    }  # fmt: skip
    for axis, names in axes.items():
        counts = Counter(getattr(words, axis) for words in parsed)
        assert set(counts) == set(names)
        assert max(counts.values()) - min(counts.values()) <= 1


def _centre(coverage: torch.Tensor) -> torch.Tensor:
    axis = torch.arange(SIZE) + 0.5
    mass = coverage.sum(dim=(2, 3, 4))
    x = (coverage.sum(dim=(2, 3)) * axis).sum(dim=-1) / mass
    y = (coverage.sum(dim=(2, 4)) * axis).sum(dim=-1) / mass
    return torch.stack([x, y], dim=-1)
