"""The Frechet distance agrees with closed forms and has the right symmetries."""

from __future__ import annotations

import pytest
import torch

from benchmarks.tiny.frechet import frechet_distance, frechet_of_gaussians


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    first = torch.randn(60, 12, generator=random)
    second = 0.3 + 1.5 * torch.randn(45, 12, generator=random)
    return first, second


def test_by_hand_in_one_dimension() -> None:
    # Means 1 and 4, variances 4 and 9: (1 - 4)^2 + (2 - 3)^2.
    found = frechet_of_gaussians(
        torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([4.0]), torch.tensor([[9.0]])
    )
    assert found == pytest.approx(10)


def test_by_hand_from_samples() -> None:
    # {0, 2} has mean 1 and variance 2; {3, 9} has mean 6 and variance 18:
    # (1 - 6)^2 + (sqrt 2 - sqrt 18)^2 = 25 + 8. In one dimension shrinkage has no effect.
    found = frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [9.0]]))
    assert found == pytest.approx(33)


def test_commuting_covariances_have_a_closed_form() -> None:
    random = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=random, dtype=torch.float64))[0]
    one, two = 0.1 + torch.rand(2, 6, generator=random, dtype=torch.float64)
    mean = torch.randn(6, generator=random, dtype=torch.float64)
    found = frechet_of_gaussians(mean, (axes * one) @ axes.T, torch.zeros(6), (axes * two) @ axes.T)
    closed = mean.square().sum() + (one.sqrt() - two.sqrt()).square().sum()
    assert found == pytest.approx(float(closed))


def test_non_commuting_covariances_by_hand() -> None:
    # C1 = diag(4, 1), C2 = [[1, 1], [1, 1]]: C1^1/2 C2 C1^1/2 = [[4, 2], [2, 1]] has the
    # eigenvalues 5 and 0, so the distance is 5 + 2 - 2 sqrt 5.
    found = frechet_of_gaussians(
        torch.zeros(2), torch.diag(torch.tensor([4.0, 1.0])), torch.zeros(2), torch.ones(2, 2)
    )
    assert found == pytest.approx(7 - 2 * 5**0.5)


def test_the_distance_of_a_set_from_itself_is_zero(
    features: tuple[torch.Tensor, torch.Tensor],
) -> None:
    assert frechet_distance(features[0], features[0]) == pytest.approx(0, abs=1e-6)


def test_symmetric(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    first, second = features
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
def test_invariant_under_a_common_rotation_and_shift(
    features: tuple[torch.Tensor, torch.Tensor], shrinkage: float
) -> None:
    first, second = features
    random = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=random))[0]
    rotated = frechet_distance(first @ rotation + 5, second @ rotation + 5, shrinkage)
    assert rotated == pytest.approx(frechet_distance(first, second, shrinkage), rel=1e-4)


def test_a_shift_adds_its_square(
    features: tuple[torch.Tensor, torch.Tensor],
) -> None:
    first, _ = features
    assert frechet_distance(first, first + 2) == pytest.approx(4 * 12, rel=1e-5)


def test_fewer_videos_than_features_are_accepted() -> None:
    random = torch.Generator().manual_seed(3)
    first, second = torch.randn(2, 10, 48, generator=random)
    assert 0 < frechet_distance(first, second) < 200
