"""Build a store of preference pairs from clips or prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_video.data.pair_check import context_fault, pair_fault
from dpo_video.data.store import PairStore
from dpo_video.data.video_writer import write_video
from dpo_video.errors import UserError
from dpo_video.registry.returned import decoded, wrong
from dpo_video.settings import BuildSettings
from dpo_video.strategies import Labeler, PairBuilder, VideoModel
from dpo_video.support.rng import generator
from dpo_video.types import Clip, Context, Pair, Prompt, Video, VideoShape

COUNT = 64  # default number of pairs
PROMPTS_KEPT = 64  # encoded prompts in memory, which may be megabytes each

Source = Callable[[int], Clip | None]
"""Returns the clip of pair `i`; None after the last one."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One of `count` processes or machines that share a build.

    It builds the pairs whose index modulo `count` is `number`.
    """

    number: int = 0
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """Progress: a pair was built."""

    done: int
    """Pairs in the store, of all workers."""
    total: int
    prompt: str
    seconds: float
    """Time that this pair took."""
    decided: bool
    """Whether any frame has a preference; False for ties and unlabelled pairs."""


def wanted(settings: BuildSettings, available: int | None) -> int:
    """Number of pairs to build from a source of at most `available` pairs (None: no limit)."""
    if available is None:
        return settings.count or COUNT
    return min(settings.count or available, available)


def build(
    store: PairStore,
    clips: Source,
    builder: PairBuilder,
    model: VideoModel,
    settings: BuildSettings,
    *,
    seed: int,
    labeler: Labeler | None = None,
    available: int | None = None,
    worker: Worker = Worker(),
) -> Iterator[BuildReport]:
    """Build the pairs that the store lacks, up to the requested number or the end of `clips`.

    Pair `i` depends on the seed and on `i` alone, or on the seed of its clip if that has one, so
    interruptions and the number of workers do not change it.

    Raises:
        UserError: if a pair is not finite; such a pair is not stored.
        PluginError: if a pair is not what it must be; it is not stored either.
    """
    store.check_fits(model)

    @lru_cache(maxsize=PROMPTS_KEPT)
    def encode(prompt: str) -> Context:
        encoded = model.encode_prompts([prompt])
        if fault := context_fault(encoded):
            raise wrong(model, fault)
        return {name: value.cpu() for name, value in encoded.items()}

    total, kept = wanted(settings, available), False
    for index in range(worker.number, total, worker.count):
        if index in store:
            continue
        started = time.monotonic()
        clip = clips(index)
        if clip is None:
            return
        drawn = (seed, "pair", index) if clip.seed is None else (clip.seed, "prompt")
        pair = builder(clip, model, labeler, generator(*drawn))
        # What is not finite may be the model's fault.
        if fault := pair_fault(pair, model, finite=False):
            raise wrong(builder, fault)
        context = encode(pair.prompt) if pair.context is None else pair.context
        _check_finite(pair, context, index)
        if fault := pair_fault(pair, model):
            raise wrong(builder, fault)
        if not kept:
            store.keep_negative(model.negative_context())
            kept = True
        shown = preview(pair, model) if settings.previews else None
        store.append(pair, context, index, partial(_write_preview, shown, model.shape))
        yield BuildReport(
            done=store.made,
            total=total,
            prompt=pair.prompt,
            seconds=time.monotonic() - started,
            decided=bool(pair.preference.any()),
        )


def _check_finite(pair: Pair, context: Mapping[str, Tensor], index: int) -> None:
    parts = {
        "first video": pair.first,
        "second video": pair.second,
        "preference": pair.preference,
        **({} if pair.between is None else {"ranked video": pair.between}),
        **{f"encoded prompt ({name})": value for name, value in context.items()},
    }
    for part, value in parts.items():
        if not value.isfinite().all():
            raise UserError(
                f"Pair {index} ('{pair.prompt}', of {pair.source}) was not stored: its {part} is "
                "not finite. If the model computed it, try another precision (--set "
                'train.mixed_precision="bf16" or "no"); if it is in a file, leave that file out.'
            )


def _write_preview(video: Video | None, shape: VideoShape, path: Path) -> None:
    if video is not None:
        write_video(path, video, shape.fps, scale=max(1, 128 // shape.height))


def preview(pair: Pair, model: VideoModel) -> Video:
    """First video, second video and region side by side."""
    first, second = (  # one at a time: two do not fit on every GPU
        decoded(model, latents[None].to(model.device))[0].cpu()
        for latents in (pair.first, pair.second)
    )
    region: Float[Tensor, "1 F H W"] = torch.nn.functional.interpolate(
        pair.region[None], size=first.shape[1:]
    )[0]
    # The second video dimmed outside its region shows what was repainted.
    shown = second * (0.3 + 0.7 * region)
    return torch.cat([first, second, shown], dim=-1)


def cycle_prompts(prompts: Sequence[Prompt]) -> Source:
    """Clips without a video that cycle through prompts; a prompt's own seed grows every time."""

    def clip(index: int) -> Clip:
        cycle, number = divmod(index, len(prompts))
        prompt = prompts[number]
        return Clip(
            name="prompt",
            caption=prompt.text,
            negative_prompt=prompt.negative_prompt,
            seed=None if prompt.seed is None else prompt.seed + cycle,
        )

    return clip


def in_order(clips: Iterator[Clip]) -> Source:
    """Clips of an iterator by index; indices must increase, and those between are skipped."""
    numbered = enumerate(clips)
    return lambda index: next((clip for number, clip in numbered if number == index), None)
