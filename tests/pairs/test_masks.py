"""LocalDPO's regions follow the distribution of the paper's generator, and draws repeat."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Generator, Tensor

from dpo_video.errors import UserError
from dpo_video.pairs._masks import RegionOptions, draw_outline, draw_region, fill

PAPER = ((13, 60, 90), (480, 720))
TINY = ((16, 16, 16), (64, 64))
STILL = RegionOptions(moving_share=0)
MOVING = RegionOptions(moving_share=1)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def crossings(outline: Tensor) -> int:
    """Number of crossings between the edges of a closed outline."""
    start, end = outline.double(), outline.double().roll(-1, dims=0)

    def side(a: Tensor, b: Tensor, point: Tensor) -> Tensor:
        (ax, ay), (bx, by), (px, py) = a.T, b.T, point.T
        return (
            (bx - ax)[:, None] * (py - ay[:, None]) - (by - ay)[:, None] * (px - ax[:, None])
        ).sign()

    apart = side(start, end, start) * side(start, end, end)
    return int(((apart < 0) & (apart.T < 0)).sum()) // 2


@pytest.mark.parametrize(("latents", "pixels"), [PAPER, TINY, ((5, 8, 8), (64, 64))])
def test_a_region_is_binary_and_never_empty_or_full(
    latents: tuple[int, int, int], pixels: tuple[int, int]
) -> None:
    generator = seeded()
    for _ in range(50):
        region = draw_region(latents, pixels, generator)
        assert region.shape == (1, *latents)
        assert region.dtype == torch.float32
        assert set(region.unique().tolist()) == {0.0, 1.0}
        covered = region.mean(dim=(0, 2, 3))
        assert covered.min() > 0
        assert covered.max() < 1


def test_a_region_covers_what_the_published_generator_covers() -> None:
    # 700 masks of the authors' generator: mean 9.0%; 4.8, 7.8 and 15.8% at the first, fifth and
    # ninth tenth; 4.6% of them cover more than a fifth.
    generator = seeded()
    areas = torch.stack([draw_region(*PAPER, generator).mean() for _ in range(600)])
    low, median, high = areas.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    assert 0.043 < low < 0.054
    assert 0.070 < median < 0.086
    assert 0.14 < high < 0.18
    assert areas.mean().item() == pytest.approx(0.090, rel=0.1)
    assert 0.02 < (areas > 0.2).float().mean() < 0.08


def test_shrinking_keeps_many_blobs_as_small_as_one() -> None:
    def mean_area(**options: float) -> float:
        generator = seeded()
        drawn = RegionOptions(moving_share=0, **options)  # type: ignore[arg-type]
        return float(
            torch.stack([draw_region(*PAPER, generator, drawn).mean() for _ in range(150)]).mean()
        )

    one = mean_area(max_blobs=1)
    assert mean_area(shrink_share=1) == pytest.approx(one, rel=0.15)
    assert mean_area(shrink_share=0, shrink_each_share=0) > 2 * one


def test_the_generator_determines_the_region() -> None:
    torch.manual_seed(1)
    first = draw_region(*TINY, seeded(3))
    torch.manual_seed(2)
    assert torch.equal(first, draw_region(*TINY, seeded(3)))
    assert not torch.equal(first, draw_region(*TINY, seeded(4)))


def test_still_regions_do_not_move_and_moving_ones_do() -> None:
    for seed in range(20):
        still = draw_region(*PAPER, seeded(seed), STILL)
        assert torch.equal(still, still[:, :1].expand_as(still))
        moving = draw_region(*PAPER, seeded(seed), MOVING)
        assert not torch.equal(moving, moving[:, :1].expand_as(moving))


def test_about_half_of_the_single_blobs_move() -> None:
    generator = seeded()
    single = RegionOptions(max_blobs=1)
    moves = [
        bool((region != region[:, :1]).any())
        for region in (draw_region(*PAPER, generator, single) for _ in range(200))
    ]
    assert 0.4 < sum(moves) / len(moves) < 0.6


def test_a_moving_blob_moves_a_few_pixels_per_frame() -> None:
    drift = RegionOptions(max_blobs=1, moving_share=1, scale_share=0, turn_share=0)
    centres = torch.stack([torch.arange(480.0)[:, None].expand(480, 720),
                           torch.arange(720.0).expand(480, 720)])  # fmt: skip
    for seed in range(5):
        # Latents at the pixels' own resolution show the path to the pixel.
        region = draw_region((6, 480, 720), (480, 720), seeded(seed), drift)[0]
        mass = region.sum(dim=(1, 2))
        assert mass.max() / mass.min() < 1.02  # it does not grow
        middle = torch.einsum("fhw,ahw->fa", region, centres) / mass[:, None]
        num_inference_steps = middle.diff(dim=0).norm(dim=1)
        assert 0.8 < float(num_inference_steps[0]) < 3.2
        assert float(num_inference_steps.max()) < 10


def test_filling_cells_equals_taking_the_nearest_pixel() -> None:
    for seed in range(5):
        # Cells of 5 pixels: their centres are centres of pixels.
        coarse = draw_region((3, 60, 90), (300, 450), seeded(seed))
        pixels = draw_region((3, 300, 450), (300, 450), seeded(seed))
        nearest = F.interpolate(pixels, size=(60, 90), mode="nearest-exact")
        assert (coarse != nearest).float().mean() < 1e-4


def test_an_outline_never_crosses_itself() -> None:
    eight = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert crossings(eight) == 1
    generator = seeded()
    for _ in range(100):
        outline = draw_outline(generator)
        assert outline.min() >= 0
        assert outline.max() <= 1
        assert crossings(outline) == 0


def test_filling_follows_the_even_odd_rule() -> None:
    square = torch.tensor([[1.0, 1.0], [4.0, 1.0], [4.0, 3.0], [1.0, 3.0]])
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[1:3, 1:4] = True
    filled = fill(torch.stack([square, square.flip(0)]), 5, 6)
    assert torch.equal(filled[0], expected)
    assert torch.equal(filled[1], expected)
    # Parts outside the grid are cut off, not wrapped around.
    assert torch.equal(fill((square - 2)[None], 5, 6)[0, :1, :2], torch.ones(1, 2).bool())
    assert not fill((square + 100)[None], 5, 6).any()


def test_a_filled_circle_has_its_area() -> None:
    angles = torch.arange(256) * (2 * torch.pi / 256)
    circle = 50 + 40 * torch.stack([angles.cos(), angles.sin()], dim=1)
    assert float(fill(circle[None], 100, 100).sum()) == pytest.approx(torch.pi * 1600, rel=0.005)


def test_latents_too_coarse_for_a_region_are_an_error() -> None:
    with pytest.raises(UserError, match="None of 100 regions fits latents of 2x1x1"):
        draw_region((2, 1, 1), (8, 8), seeded())


@pytest.mark.parametrize(
    "wrong", [{"max_blobs": 0}, {"moving_share": 1.5}, {"max_speed": 0}, {"blobs": 3}]
)
def test_wrong_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        RegionOptions.model_validate(wrong)


def test_every_option_is_described() -> None:
    assert all(field.description for field in RegionOptions.model_fields.values())
