"""What a pair must be before it is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dpo_video.registry.returned import tensor_fault
from dpo_video.strategies import VideoModel
from dpo_video.types import Pair


def context_fault(context: object) -> str:
    """What is wrong with one encoded prompt, as the end of a sentence; "" if nothing is."""
    if not isinstance(context, Mapping) or not context:
        return f"encodes a prompt as a {type(context).__name__}, not as tensors by name"
    for name, value in context.items():
        if not isinstance(value, Tensor):
            return f"encodes a prompt with '{name}', a {type(value).__name__} and no tensor"
        if not value.ndim or len(value) != 1:
            shape = tuple(value.shape)
            return f"encodes one prompt with '{name}' of the shape {shape}, without an axis of 1"
    return ""


def pair_fault(pair: object, model: VideoModel, *, finite: bool = True) -> str:
    """What is wrong with a builder's pair, as the end of a sentence; "" if nothing is.

    Args:
        pair: What the builder returned.
        model: The model that it was built for.
        finite: Whether its latents must be finite.
    """
    if not isinstance(pair, Pair):
        return f"returns a {type(pair).__name__}, not a Pair"
    _, *cells = shape = model.latent_shape
    faults = {
        "first": tensor_fault(pair.first, shape, finite=finite, device="cpu"),
        "second": tensor_fault(pair.second, shape, finite=finite, device="cpu"),
        "preference": tensor_fault(
            pair.preference, cells[:1], finite=finite, within=(-1, 1) if finite else None,
            device="cpu",
        ),
        "region": tensor_fault(pair.region, (1, *cells), device="cpu"),
    }  # fmt: skip
    for part, fault in faults.items():
        if fault:
            return f"returns a pair whose {part} {fault}"
    if fault := _group_fault(pair, shape, finite=finite):
        return f"returns a group {fault}"
    if pair.first.dtype != pair.second.dtype:
        return "returns a pair whose two videos have different types"
    if not ((pair.region == 0) | (pair.region == 1)).all():
        return "returns a pair whose region has values other than 0 and 1"
    outside = (pair.region == 0).expand_as(pair.first)
    if finite and not torch.equal(pair.first[outside], pair.second[outside]):
        return (
            "returns a pair whose videos differ outside their region (it must copy one's latents "
            "there)"
        )
    numbers = (pair.strength, pair.weight)
    if not all(isinstance(number, (int, float)) for number in numbers):
        return "returns a pair whose strength or weight is no number"
    if not 0 <= pair.strength <= 1:
        return f"returns a pair whose strength is {pair.strength}, not in [0, 1]"
    if not (pair.weight > 0 and math.isfinite(pair.weight)):
        return f"returns a pair whose weight is {pair.weight}, not above 0"
    if not (isinstance(pair.prompt, str) and isinstance(pair.source, str)):
        return "returns a pair whose prompt or source is no text"
    return ""


def _group_fault(pair: Pair, shape: Sequence[int], *, finite: bool) -> str:
    """What is wrong with the samples between the two videos, as the end of a sentence."""
    ranks, between = list(pair.ranks), pair.between
    if between is None and not ranks:
        return ""  # a pair
    if between is None or len(ranks) < 3:
        return "without samples between, or without a rank for each of its samples"
    if fault := tensor_fault(between, (len(ranks) - 2, *shape), finite=finite, device="cpu"):
        return f"whose between {fault}"
    if between.dtype != pair.first.dtype:
        return "whose samples have different types"
    if not all(type(rank) is int and rank >= 0 for rank in ranks) or ranks != sorted(ranks):
        return f"whose ranks are {ranks}, not numbers from 0 that never fall"
    return ""
