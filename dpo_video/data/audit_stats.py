"""Summaries of stored pairs for an audit, and a classifier on simple statistics of latents."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dpo_video.extensions import PairSummary
from dpo_video.support.statistics import Array
from dpo_video.types import PairBatch

SIGNATURE = 4
"""Cells per side, and most frames, that a video is reduced to for the comparison of pairs."""
FOLDS = 5


def summarize(index: int, batch: PairBatch) -> PairSummary:
    """Summarize a batch of one pair."""
    tensors = (batch.first, batch.second, batch.preference, batch.region, *batch.context.values(),
               *(() if batch.between is None else (batch.between,)))  # fmt: skip
    first, second, region = batch.first[0].float(), batch.second[0].float(), batch.region[0]
    scale = first.std().item()
    difference = first - second
    inside = (region > 0).expand_as(first)
    apart = difference[inside].square().mean().sqrt().item() if inside.any() else 0.0
    labels = batch.preference[0]
    small = torch.nn.functional.adaptive_avg_pool3d(
        torch.stack([first, second]), (min(SIGNATURE, first.shape[1]), SIGNATURE, SIGNATURE)
    )
    return PairSummary(
        index=index,
        finite=all(bool(tensor.isfinite().all()) for tensor in tensors),
        label=int(labels.nan_to_num().sum().sign()),
        decided=(labels != 0).float().mean().item(),
        distance=apart / scale if scale > 0 else 0.0,
        outside=difference[~inside].abs().max().item() if not inside.all() else 0.0,
        scale=scale,
        hashes=(_hash(batch.first), _hash(batch.second)),
        signature=small.flatten(),
        statistics=(statistics(first), statistics(second)),
    )


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def statistics(latents: Float[Tensor, "c f h w"]) -> Array:
    """Simple statistics of a video that a shortcut might use; `statistic_names` names them."""
    channels = [latents.mean(dim=(1, 2, 3)), latents.std(dim=(1, 2, 3)).log()]
    size = latents.std()
    steps = [latents]
    for _ in range(2):  # first and second differences over time
        steps.append(steps[-1].diff(dim=1) if steps[-1].shape[1] > 1 else steps[-1][:, :0])
    energies = [
        steps[1],
        steps[2],
        torch.cat([latents.diff(dim=2).flatten(), latents.diff(dim=3).flatten()]),
        latents.diff(n=2, dim=3),
    ]
    shares = [
        (part.square().mean().sqrt() / size).clamp_min(1e-6).log() if part.numel() else size * 0
        for part in energies
    ]
    return np.asarray(torch.cat([*channels, torch.stack([size.log(), *shares])]).double())


def statistic_names(channels: int) -> list[str]:
    """Names of the numbers that `statistics` returns."""
    each = [f"{what} of latent channel {c}" for what in ("mean", "spread") for c in range(channels)]
    return [*each, "overall contrast", "change from frame to frame", "flicker (second difference "
            "over time)", "fine detail (differences between neighbours)", "grain (second "
            "difference in space)"]  # fmt: skip


def held_out_accuracy(rows: Array) -> float:
    """Share of pairs that a logistic regression fitted to the other folds ranks correctly.

    `rows` holds the chosen video's statistics less the rejected one's, a row per pair. There is no
    intercept, because the order of the two videos carries no information. Folds are interleaved;
    ties count half.
    """
    size = np.sqrt((rows**2).mean(axis=0))
    scaled = rows / np.where(size > 0, size, 1.0)
    score = 0.0
    for fold in range(FOLDS):
        held = np.arange(len(rows)) % FOLDS == fold
        weights = _logistic(scaled[~held])
        score += float(((np.sign(scaled[held] @ weights) + 1) / 2).sum())
    return score / len(rows)


def _logistic(rows: Array, ridge: float = 1.0, steps: int = 8) -> Array:
    """Weights that minimize `sum log(1 + exp(-rows w)) + ridge/2 |w|^2`, by Newton's method."""
    weights = np.zeros(rows.shape[1])
    for _ in range(steps):
        wrong = 1 / (1 + np.exp(np.clip(rows @ weights, -30, 30)))
        slope = ridge * weights - rows.T @ wrong
        curve = (rows * (wrong * (1 - wrong))[:, None]).T @ rows + ridge * np.eye(len(weights))
        weights = weights - np.linalg.solve(curve, slope)
    return weights
