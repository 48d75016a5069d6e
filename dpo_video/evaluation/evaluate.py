"""Base against tuned: the same prompts, the same noise, every metric on every video."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.diffusion.sampling import check_drawn
from dpo_video.errors import RunError, UserError
from dpo_video.evaluation.verdict import MetricResult, Role
from dpo_video.memory.packed_weights import frozen_weights
from dpo_video.registry.attribution import plugin_of, said
from dpo_video.settings import EvaluateSettings
from dpo_video.strategies import Metric, VideoModel
from dpo_video.training.checkpoint import load_adapter
from dpo_video.types import Videos


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A metric that has no result."""

    name: str
    reason: str
    """A sentence."""
    error: Exception | None = None
    """What a plugin's metric raised."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What both networks drew, and what the metrics say of it."""

    base: Videos
    tuned: Videos
    metrics: tuple[MetricResult, ...]
    left_out: tuple[LeftOut, ...] = ()


def merged(model: VideoModel, adapter: Path) -> nn.Module:
    """The model's denoiser with an adapter merged into it, in place: the bare one is gone.

    Raises:
        RunError: if the adapter does not fit the denoiser, is not finite, or cannot be merged.
    """
    instead = "Evaluate the run with the backbone that it was trained on."
    policy = load_adapter(model.denoiser, adapter, instead)
    if next(frozen_weights(policy), None) is not None:  # nothing can be added to packed weights
        return policy.eval()
    try:
        network: nn.Module = policy.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:  # it is not finite, or none of ours
        raise RunError(
            f"The adapter in '{adapter}' cannot be merged into the model ({error}). If its "
            "training has diverged, take an earlier checkpoint."
        ) from error
    return network.eval().requires_grad_(False)


def compare(
    model: VideoModel,
    adapter: Path,
    metrics: Mapping[str, Metric],
    prompts: Sequence[str],
    settings: EvaluateSettings,
    *,
    base: Videos | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Draw with the base, merge the adapter, draw again, measure both.

    Args:
        model: the base; its denoiser has the adapter merged into it afterwards.
        adapter: a folder in PEFT's format.
        metrics: what to measure.
        prompts: one a video.
        settings: seeds and sampling.
        base: the base's videos, if these very ones have been drawn already.
        on_progress: told how many of the `2 * len(prompts)` videos are there.

    A metric of a plugin that fails, and any that gives something that is not finite, is left out.

    Raises:
        UserError: if a video is not finite, or no metric is left that judges.
        Exception: of a plugin's metric, if that is why.
    """
    sets: list[Videos] = [] if base is None else [base]
    while len(sets) < 2:
        denoiser = merged(model, adapter) if sets else model.denoiser
        drawn: list[Tensor] = []
        for videos in draw(model, denoiser, prompts, settings):
            drawn.append(videos)
            on_progress(len(sets) * len(prompts) + sum(len(part) for part in drawn))
        sets.append(torch.cat(drawn))
    before, tuned = sets
    found = [
        _measure(name, metric, before, tuned, prompts, settings.batch_size)
        for name, metric in metrics.items()
    ]
    results = tuple(each for each in found if isinstance(each, MetricResult))
    left_out = tuple(each for each in found if isinstance(each, LeftOut))
    if left_out and not any(result.role is Role.TARGET for result in results):
        for metric in left_out:
            raise metric.error or UserError(metric.reason)
    return Comparison(base=before, tuned=tuned, metrics=results, left_out=left_out)


def _measure(
    name: str, metric: Metric, base: Videos, tuned: Videos, prompts: Sequence[str], batch: int
) -> MetricResult | LeftOut:
    try:
        before, after = (values(metric, videos, prompts, batch) for videos in (base, tuned))
    except UserError:
        raise
    except Exception as error:
        if (plugin := plugin_of(metric)) is None:
            raise
        return LeftOut(name=name, reason=said(plugin, error), error=error)
    for which, measured in (("base", before), ("tuned", after)):
        for prompt, value in zip(prompts, measured, strict=True):
            if not math.isfinite(value):
                reason = (
                    f"The metric '{name}' is left out: it is {value} for the {which} model's video "
                    f"of '{prompt}'. Leave it out (--metric NAME for the others), or mend it."
                )
                return LeftOut(name=name, reason=reason)
    return MetricResult.measured(
        name,
        before,
        after,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        role=Role(metric.role),
    )


def draw(
    model: VideoModel,
    denoiser: nn.Module,
    prompts: Sequence[str],
    settings: EvaluateSettings,
) -> Iterator[Videos]:
    """Batches of videos on the CPU; the `i`-th prompt gets the seed `settings.seed + i`.

    Raises:
        UserError: if one is not finite.
    """
    for start in range(0, len(prompts), settings.batch_size):
        texts = prompts[start : start + settings.batch_size]
        seeds = range(settings.seed + start, settings.seed + start + len(texts))
        latents = model.sample(
            model.encode_prompts(texts),
            initial_noise(model, seeds),
            denoiser=denoiser,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )
        videos = model.decode_videos(latents).cpu()
        check_drawn(latents, videos, texts)
        yield videos


def values(metric: Metric, videos: Videos, prompts: Sequence[str], batch: int) -> list[float]:
    """A metric's number for every video, `batch` of them at a time.

    Raises:
        ValueError: if it gives more or fewer.
    """
    parts = [
        metric(videos[i : i + batch], prompts[i : i + batch]) for i in range(0, len(videos), batch)
    ]
    found = [float(value) for value in torch.cat(parts)]
    if len(found) != len(videos):
        raise ValueError(f"{len(found)} numbers for {len(videos)} videos")
    return found
