"""Measure base and tuned model: the same prompts and noise, every metric on every video."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from dpo_video.data.prompts import batched_prompts, negative_option
from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.diffusion.sampling import check_finite
from dpo_video.errors import UserError
from dpo_video.evaluation.adapter import put_on
from dpo_video.evaluation.change import Witness
from dpo_video.evaluation.verdict import MetricResult, Role
from dpo_video.registry.attribution import plugin_of, sentence
from dpo_video.settings import EvaluateSettings
from dpo_video.strategies import Metric, VideoModel
from dpo_video.types import Prompt, Videos


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A metric without a result."""

    name: str
    reason: str
    """The reason, as a sentence."""
    error: Exception | None = None
    """The exception of a plugin's metric."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The videos of both networks and the metrics on them."""

    base: Videos
    tuned: Videos
    metrics: tuple[MetricResult, ...]
    left_out: tuple[LeftOut, ...] = ()


class _Second(TypedDict, total=False):
    """Fields of a `MetricResult` on its second measurement."""

    witness: Witness
    no_witness: str


def measure(
    model: VideoModel,
    adapter: Path,
    metrics: Mapping[str, Metric],
    prompts: Sequence[Prompt],
    settings: EvaluateSettings,
    *,
    base: Videos | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Sample videos of the base model, put the adapter on, sample again, and measure both sets.

    A metric that gives a value that is not finite, and a plugin's metric that fails, is left out.
    A metric with a witness (`Metric.witness`) is measured by it as well.

    Args:
        model: The base model; the adapter is put on its denoiser.
        adapter: A folder in PEFT's format.
        metrics: The metrics by name.
        prompts: One per video, with its seed (`data.prompts.prompt_table`).
        settings: Sampling and thresholds.
        base: The base model's videos for the same prompts and settings, if they exist already.
        on_progress: Called with the number of finished videos, of `2 * len(prompts)`.

    Raises:
        UserError: if a video is not finite, or every target metric was left out.
        Exception: the exception of a plugin's metric, if it is the reason.
    """
    sets: list[Videos] = [] if base is None else [base]
    while len(sets) < 2:
        denoiser = put_on(model, adapter) if sets else model.denoiser
        batches: list[Tensor] = []
        for videos in sample_videos(model, denoiser, prompts, settings):
            batches.append(videos)
            on_progress(len(sets) * len(prompts) + sum(len(batch) for batch in batches))
        sets.append(torch.cat(batches))
    base, tuned = sets
    texts = [prompt.text for prompt in prompts]
    found = [
        _measure(name, metric, base, tuned, texts, settings) for name, metric in metrics.items()
    ]
    results = tuple(each for each in found if isinstance(each, MetricResult))
    left_out = tuple(each for each in found if isinstance(each, LeftOut))
    if left_out and not any(result.role is Role.TARGET for result in results):
        for metric in left_out:
            raise metric.error or UserError(metric.reason)
    return Measurement(base=base, tuned=tuned, metrics=results, left_out=left_out)


def _measure(
    name: str,
    metric: Metric,
    base: Videos,
    tuned: Videos,
    prompts: Sequence[str],
    settings: EvaluateSettings,
) -> MetricResult | LeftOut:
    try:
        before, after = (
            metric_values(metric, videos, prompts, settings.batch_size) for videos in (base, tuned)
        )
    except UserError:
        raise
    except Exception as error:
        if (plugin := plugin_of(metric)) is None:
            raise
        return LeftOut(name=name, reason=sentence(plugin, error), error=error)
    for which, measured in (("base", before), ("tuned", after)):
        for prompt, value in zip(prompts, measured, strict=True):
            if not math.isfinite(value):
                reason = (
                    f"The metric '{name}' is left out: it is {value} for the {which} model's video "
                    f"of '{prompt}'. Select other metrics with --metric NAME, or fix it."
                )
                return LeftOut(name=name, reason=reason)
    return MetricResult.measured(
        name,
        before,
        after,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        role=Role(metric.role),
        prompts=prompts,
        min_effect=settings.min_effects.get(name, settings.min_effect),
        tolerance=settings.tolerance,
        **_witness(metric, base, tuned, prompts, settings),
    )


def _witness(
    metric: Metric, base: Videos, tuned: Videos, prompts: Sequence[str], settings: EvaluateSettings
) -> _Second:
    """The second measurement of a metric, or the reason why it failed."""
    try:
        if (second := metric.witness()) is None:
            return {}
        name, other = second
        before, after = (
            metric_values(other, videos, prompts, settings.batch_size) for videos in (base, tuned)
        )
    except UserError as error:
        return {"no_witness": str(error)}
    except Exception as error:
        if (plugin := plugin_of(metric)) is None:
            raise
        return {"no_witness": sentence(plugin, error)}
    if not all(map(math.isfinite, (*before, *after))):
        return {"no_witness": f"A value by {name} is not finite."}
    return {"witness": Witness.measured(name, before, after, prompts=prompts)}


def sample_videos(
    model: VideoModel,
    denoiser: nn.Module,
    prompts: Sequence[Prompt],
    settings: EvaluateSettings,
) -> Iterator[Videos]:
    """Yield batches of videos on the CPU, one video per prompt.

    Raises:
        UserError: if a video is not finite.
    """
    for batch in batched_prompts(prompts, settings.batch_size):
        texts = [prompt.text for prompt in batch]
        latents = model.sample(
            model.encode_prompts(texts),
            initial_noise(model, [prompt.seed or 0 for prompt in batch]),
            denoiser=denoiser,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            **negative_option(batch[0].negative_prompt),
        )
        videos = model.decode_videos(latents).cpu()
        check_finite(latents, videos, texts)
        yield videos


def metric_values(
    metric: Metric, videos: Videos, prompts: Sequence[str], batch: int
) -> list[float]:
    """A metric's value for every video, computed `batch` videos at a time.

    Raises:
        ValueError: if the number of values is not that of the videos.
    """
    parts = [
        metric(videos[i : i + batch], prompts[i : i + batch]) for i in range(0, len(videos), batch)
    ]
    found = [float(value) for value in torch.cat(parts)]
    if len(found) != len(videos):
        raise ValueError(f"{len(found)} values for {len(videos)} videos")
    return found
