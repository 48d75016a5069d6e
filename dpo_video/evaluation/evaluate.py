"""Measure base and tuned model: the same prompts and noise, every metric on every video.

Videos are drawn, measured and written one batch at a time, so the memory does not depend on their
number, and what is finished is not done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_video.data.build import Worker
from dpo_video.data.encodings import PromptEncodings
from dpo_video.data.prompts import batched_prompts, negative_option
from dpo_video.data.video import read_video
from dpo_video.data.video_writer import video_bytes
from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.diffusion.sampling import check_finite
from dpo_video.evaluation.adapter import put_on
from dpo_video.evaluation.measuring import Measurement, Meters
from dpo_video.evaluation.videos import VideoRecord, VideoSet, hash_of
from dpo_video.registry.returned import checked, decoded
from dpo_video.settings import EvaluateSettings
from dpo_video.strategies import Metric, VideoModel
from dpo_video.support.claims import claim
from dpo_video.support.hashing import file_digest
from dpo_video.types import Prompt, Videos

_POLL = 0.2  # seconds
Report = Callable[[int], None]
Source = Callable[[Sequence[Sequence[Prompt]]], Iterator[Videos]]
"""Returns the videos of each batch of prompts, on the CPU."""


def measure(
    model: VideoModel,
    adapter: Path,
    metrics: Mapping[str, Metric],
    prompts: Sequence[Prompt],
    settings: EvaluateSettings,
    folder: Path,
    *,
    start: Path | None = None,
    base_folder: Path | None = None,
    encodings: PromptEncodings | None = None,
    drawn_from: object = None,
    worker: Worker = Worker(),  # noqa: B008 - it is frozen
    on_progress: Report = lambda done: None,
    note: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Sample videos of the base model, put the adapter on, sample again, and measure both sets.

    Every video is written to `folder` with its values, and finished ones are not drawn again. A
    metric that gives a value that is not finite, and a plugin's metric that fails, is left out. A
    metric with a witness (`Metric.witness`) is measured by it as well.

    Args:
        model: The base model; the adapter is put on its denoiser.
        adapter: A folder in PEFT's format.
        metrics: The metrics by name.
        prompts: One per video, with its seed (`data.prompts.prompt_table`).
        settings: Sampling and thresholds.
        folder: Receives the videos of both models.
        start: The adapter that the base model has, in PEFT's format; without one by default.
        base_folder: Where the base's videos are kept for other evaluations; each set of them has a
            folder of its own there. `folder` by default.
        encodings: Encodes the prompts; the model alone by default.
        drawn_from: What else the videos depend on, as JSON-ready data.
        worker: The part of the videos that this process draws. It waits for the others.
        on_progress: Called with the number of finished videos, of `2 * len(prompts)`.
        note: Receives a sentence before a wait for another evaluation.

    Raises:
        UserError: if a video is not finite, or every target metric was left out.
        Exception: the exception of a plugin's metric, if it is the reason.
    """
    batches = list(batched_prompts(prompts, settings.batch_size))
    common = [
        model.identity, str(model.device.type), torch.__version__, drawn_from,
        settings.num_inference_steps, settings.guidance_scale,
    ]  # fmt: skip
    started = [] if start is None else [_digests(start)]
    shown = VideoSet.of(folder, "base", [*common, *started], batches)
    base = replace(shown, folder=(base_folder or folder) / f"base-{hash_of(shown.keys)[:10]}")
    tuned = VideoSet.of(folder, "tuned", [common, _digests(adapter), *started], batches)
    meters = Meters.of(metrics)
    sampler = _Sampler(
        model=model, settings=settings, encodings=encodings or PromptEncodings(model)
    )
    part = (worker.number, worker.count)
    finished = _Finished([base, tuned], meters.keys, on_progress)
    work = _Work(batches=batches, meters=meters, fps=model.shape.fps, worker=worker)
    with claim(base.folder, part=part, patience=float("inf"), note=note):
        work.draw(base, lambda each: sampler.of_base(each, start), finished)
    # Both in the same arithmetic: a base with an adapter cannot be restored after merging it.
    merge = start is None
    work.draw(
        tuned, lambda each: sampler.batches(put_on(model, adapter, merge=merge), each), finished
    )
    before, after = finished.records()
    base.link_into(shown)
    return meters.results(before, after, [prompt.text for prompt in prompts], settings)


def measure_files(
    base: Sequence[Path],
    tuned: Sequence[Path],
    prompts: Sequence[str],
    metrics: Mapping[str, Metric],
    settings: EvaluateSettings,
    folder: Path,
    *,
    fps: float,
    worker: Worker = Worker(),  # noqa: B008 - it is frozen
    on_progress: Report = lambda done: None,
) -> Measurement:
    """Measure finished videos of two models, and write them to `folder` as `measure` does.

    Args:
        base: One file per prompt.
        tuned: Those of the other model.
        prompts: What the videos show, for metrics that read it.
        metrics: The metrics by name.
        settings: Thresholds.
        folder: Receives the videos, encoded again.
        fps: Frames per second of the encoded videos.
        worker: The part of the videos that this process measures.
        on_progress: Called with the number of measured videos, of `2 * len(prompts)`.

    Raises:
        UserError: if a video cannot be read, or every target metric was left out.
    """
    sides = {"base": base, "tuned": tuned}
    sets = [
        VideoSet(folder=folder, side=side, keys=tuple(hash_of(file_digest(f)) for f in files))
        for side, files in sides.items()
    ]
    meters, batches = Meters.of(metrics), [[Prompt(text=text)] for text in prompts]
    finished = _Finished(sets, meters.keys, on_progress)
    work = _Work(batches=batches, meters=meters, fps=fps, worker=worker)
    for videos, files in zip(sets, sides.values(), strict=True):
        work.draw(videos, _reader(files, batches), finished)
    before, after = finished.records()
    return meters.results(before, after, prompts, settings)


def _reader(files: Sequence[Path], batches: Sequence[Sequence[Prompt]]) -> Source:
    """Reads the finished video of each prompt."""
    by_row = {id(batch[0]): file for batch, file in zip(batches, files, strict=True)}

    def read(asked: Sequence[Sequence[Prompt]]) -> Iterator[Videos]:
        for batch in asked:
            yield read_video(by_row[id(batch[0])]).frames.float().div(255)[None]

    return read


def _digests(adapter: Path) -> list[str]:
    return [file_digest(path) for path in sorted(adapter.glob("adapter_*"))]


class _Finished:
    """What is on the disk, of all processes."""

    def __init__(self, sets: Sequence[VideoSet], metrics: Sequence[str], report: Report) -> None:
        self._sets, self._metrics, self._report = sets, metrics, report
        self._open = {(each.side, i) for each in sets for i in range(len(each))}

    def update(self) -> bool:
        """Look for newly finished videos, and report their number; whether all are finished."""
        for each in self._sets:
            for index in range(len(each)):
                if (each.side, index) in self._open and not each.lacks(index, self._metrics):
                    self._open.remove((each.side, index))
        self._report(sum(map(len, self._sets)) - len(self._open))
        return not self._open

    def records(self) -> list[list[VideoRecord]]:
        """The records of all videos, after waiting for those of other processes."""
        while not self.update():
            time.sleep(_POLL)
        found = [[each.record(index) for index in range(len(each))] for each in self._sets]
        return [[record for record in side if record is not None] for side in found]


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is the same for both sides of an evaluation."""

    batches: Sequence[Sequence[Prompt]]
    meters: Meters
    fps: float
    worker: Worker

    def draw(self, videos: VideoSet, source: Source, finished: _Finished) -> None:
        """Draw, measure and write the videos that are missing, a batch at a time."""
        starts = [sum(map(len, self.batches[:number])) for number in range(len(self.batches))]
        missing = [
            (start, batch)
            for number, (start, batch) in enumerate(zip(starts, self.batches, strict=True))
            if number % self.worker.count == self.worker.number
            and any(videos.lacks(start + i, self.meters.keys) for i in range(len(batch)))
        ]
        finished.update()
        if not missing:
            return
        drawn = source([batch for _, batch in missing])
        for (start, batch), pixels in zip(missing, drawn, strict=True):
            texts = [row.text for row in batch]
            values, failed = self.meters.measure(pixels, texts)
            for number, video in enumerate(pixels):
                own = {key: each[number] for key, each in values.items()}
                videos.write(start + number, video_bytes(video, self.fps), own, failed)
            found = [videos.record(start + number) for number in range(len(batch))]
            records = [each for each in found if each is not None]
            self.meters.check_targets(records, videos.side, texts)
            finished.update()


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
    sampler = _Sampler(model=model, settings=settings, encodings=PromptEncodings(model))
    return sampler.batches(denoiser, list(batched_prompts(prompts, settings.batch_size)))


@dataclass(kw_only=True)
class _Sampler:
    """Draws videos."""

    model: VideoModel
    settings: EvaluateSettings
    encodings: PromptEncodings

    def of_base(self, batches: Sequence[Sequence[Prompt]], start: Path | None) -> Iterator[Videos]:
        """The videos of the base model, with the adapter `start` if there is one."""
        if start is None:
            yield from self.batches(self.model.denoiser, batches)
            return
        network: Any = put_on(self.model, start, merge=False)
        try:
            yield from self.batches(network, batches)
        finally:
            network.unload()

    def batches(self, denoiser: nn.Module, batches: Sequence[Sequence[Prompt]]) -> Iterator[Videos]:
        """Yield the videos of each batch, on the CPU.

        Raises:
            UserError: if a video is not finite.
            PluginError: if the model returns something else than samples and videos of its shape.
        """
        model, settings = self.model, self.settings
        for number, batch in enumerate(batches):
            texts = [row.text for row in batch]
            guided = settings.guidance_scale != 1
            latents = model.sample(
                self.encodings.first(batches[number:], guided=guided),
                initial_noise(model, [row.seed or 0 for row in batch]),
                denoiser=denoiser,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                **negative_option(batch[0].negative_prompt),
            )
            shape = len(batch), *model.latent_shape
            checked(model, "samples", latents, shape, finite=False)
            # One at a time, so that the decoder's memory does not grow with the batch.
            videos = torch.cat([decoded(model, one).cpu() for one in latents.split(1)])
            check_finite(latents, videos, texts)
            yield videos
