"""The Frechet distance between two sets of videos, each modelled as a Gaussian of feature vectors.

The formula of FID (Heusel et al. 2017, arXiv 1706.08500) and FVD (Unterthiner et al. 2018, arXiv
1812.01717). Those names imply Inception and I3D features: quote a number from this module with the
name of its features and the number of videos.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SHRINKAGE = 0.1


def frechet_distance(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], shrinkage: float = SHRINKAGE
) -> float:
    """The squared Frechet distance between two sets of feature vectors.

    With few videos the distance is biased upwards: also quote the distance between two sets of real
    videos of the same size, which is the resolution of the measurement.

    Args:
        first: One vector per video, at least two videos.
        second: The other set.
        shrinkage: Weight of the scaled identity of equal trace in each covariance, in [0, 1]. The
            sample covariance of n videos has rank n - 1 at most, and its small eigenvalues are
            noisy; 0.1 stabilizes them and changes neither trace nor axes.
    """
    return frechet_of_gaussians(*_moments(first, shrinkage), *_moments(second, shrinkage))


def frechet_of_gaussians(
    first_mean: Float[Tensor, " d"],
    first_covariance: Float[Tensor, "d d"],
    second_mean: Float[Tensor, " d"],
    second_covariance: Float[Tensor, "d d"],
) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)` (Dowson and Landau 1982), in float64.

    The product under the root is symmetric, unlike `C1 C2`, so its eigenvalues are real at any rank
    and negative only by rounding.
    """
    root = _root(first_covariance.double())
    product = root @ second_covariance.double() @ root
    overlap = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    shift = (first_mean.double() - second_mean.double()).square().sum()
    spread = first_covariance.double().trace() + second_covariance.double().trace()
    # For equal sets this is a difference of equal numbers, negative by rounding.
    return max(0.0, float(shift + spread - 2 * overlap))


def _moments(
    features: Float[Tensor, "n d"], shrinkage: float
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    values = features.double()
    covariance = torch.cov(values.T).reshape(values.shape[1], values.shape[1])
    sphere = covariance.trace() / len(covariance) * torch.eye(len(covariance)).to(covariance)
    return values.mean(dim=0), torch.lerp(covariance, sphere, shrinkage)


def _root(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The square root of a symmetric, positive semi-definite matrix."""
    values, axes = torch.linalg.eigh(matrix)
    return (axes * values.clamp(min=0).sqrt()) @ axes.T
