"""Generate videos with a run's tuned model, or with a base model."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Self, Unpack

from torch import nn

from dpo_video.data.prompts import load_prompts, negative_option, prompt_table
from dpo_video.data.store import PairStore
from dpo_video.data.video_folder import VideoFolder, video_names
from dpo_video.data.video_writer import SUFFIXES, write_video
from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.diffusion.sampling import check_finite
from dpo_video.errors import UserError
from dpo_video.evaluation.adapter import put_on
from dpo_video.registry import returned
from dpo_video.strategies import VideoModel
from dpo_video.support.atomic import writing
from dpo_video.support.claims import WRITER, claim
from dpo_video.support.hashing import file_digest
from dpo_video.text import quoted
from dpo_video.training.checkpoint import kept_adapter
from dpo_video.training.foreign_lora import peft_adapter
from dpo_video.types import Context, Prompt, Video
from dpo_video.workflows.config import Config
from dpo_video.workflows.options import Options, checked, configure, with_options
from dpo_video.workflows.pairs import opened, prompt_encodings
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.results import GeneratedVideo
from dpo_video.workflows.runs import Run
from dpo_video.workflows.session import load_model, pick_device


@with_options
@checked
def generate(
    run: Run | Path | str | None = None,
    *,
    lora: Path | str | None = None,
    pairs: PairStore | Path | str | None = None,
    prompt: str | Sequence[str] | None = None,
    prompts: Path | str | None = None,
    seed: int | None = None,
    num_videos: int = 1,
    out: Path | str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    checkpoint: int | None = None,
    progress: Progress = SILENT,
    **options: Unpack[Options],
) -> list[GeneratedVideo]:
    """Generate videos with a run's tuned model, with a LoRA, or with a base model.

    Args:
        run: The run or its folder; None for the base model of `backbone`.
        lora: Instead of a run, a LoRA of any origin for `backbone`: a .safetensors file, a folder,
            or a hub id.
        pairs: Finished pairs, or their folder or URL, whose base model generates. Prompts that are
            stored with them need no text encoder.
        prompt: One prompt or several; by default the backbone's evaluation prompts.
        prompts: A file of prompts, or `training` or `evaluation`, the package's lists.
        seed: Seed of the first video, 0 by default; each further video takes the next one, unless
            its prompt has a seed in the file.
        num_videos: Number of videos of each prompt; without prompts, of all.
        out: A folder, which gets a named file for every video and a metadata.jsonl: a video that
            exists there is not drawn again. Or an .mp4, .gif or .webp file, or a .png with all
            frames, numbered if there are several videos of one prompt; it is overwritten. None
            writes no file.
        num_inference_steps: Sampling steps; the backbone's own number by default.
        guidance_scale: Classifier-free guidance; the backbone's own by default.
        checkpoint: The step of the run to take; the last checkpoint by default.
        progress: Receives the progress.
        options: See `Options`.

    Raises:
        UserError: for a wrong option, a LoRA of another model, or a video that is not finite.
        RunError: if there is no such run or checkpoint.
        BusyError: if another process is writing `out`.
    """
    if checkpoint is not None and run is None:
        raise UserError("--checkpoint needs a run: dpo-video generate RUN --checkpoint N")
    if run is not None and (pairs is not None or lora is not None):
        other = "--pairs" if pairs is not None else "--lora"
        raise UserError(f"A run and {other} name two models. Leave one of them out.")
    if run is not None:
        run = Run.open(run)
        options["config"] = options.get("config") or run.folder / "run.toml"
    store = opened(pairs) if pairs is not None else None
    config = configure("evaluate", options, store, kinds=("backbone",))
    rows = _rows(config, prompt, prompts, num_videos, seed or 0, progress)
    listed = prompts is not None or (bool(prompt) and not isinstance(prompt, str))
    target = None if out is None else _Target.of(Path(out), rows, listed=listed)
    with ExitStack() as stack:
        adapter = None
        if run is not None:
            adapter = stack.enter_context(kept_adapter(run.folder, checkpoint))
        if target is not None:
            stack.enter_context(
                claim(target.folder, target.lock, instead="name another one with --out")
            )
        record = VideoFolder(target.folder) if target and target.recorded else None
        model = load_model(config, pick_device(config.run.device))
        if lora is not None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="dpo-video-"))
            adapter = peft_adapter(str(lora), model, Path(scratch) / "adapter")
        base = _key(config, model, adapter, num_inference_steps, guidance_scale)
        denoiser = put_on(model, adapter) if adapter else model.denoiser
        keys = [
            hashlib.sha256(json.dumps([*base, *astuple(row)]).encode()).hexdigest()[:16]
            for row in rows
        ]
        names: Sequence[str | None] = target.names if target else [None] * len(rows)
        missing = [
            record is None or not record.has(str(name), key)
            for name, key in zip(names, keys, strict=True)
        ]
        encodings = prompt_encodings(model, config, store)
        videos = []
        for i, (row, name, key) in enumerate(zip(rows, names, keys, strict=True)):
            path = target.folder / name if target and name else None
            drawn = None
            if missing[i]:
                left = [[rows[n]] for n in range(i, len(rows)) if missing[n]]
                context = encodings.first(left, guided=guidance_scale != 1)
                drawn = _draw(model, row, context, denoiser, num_inference_steps, guidance_scale)
                if record is not None:
                    record.forget(str(name))
                if path is not None:
                    with writing(path):
                        scale = max(1, 256 // model.shape.height)
                        write_video(path, drawn, model.shape.fps, scale)
                    progress.note(f"{path}  seed {row.seed}  {row.text}")
                if record is not None:
                    record.add(str(name), row, key)
            progress.update("videos", i + 1, len(rows))
            videos.append(
                GeneratedVideo(
                    prompt=row.text,
                    seed=row.seed or 0,
                    fps=model.shape.fps,
                    video=None if record else drawn,
                    path=path,
                    existed=drawn is None,
                )
            )
        if existed := sum(video.existed for video in videos):
            progress.note(f"{existed} of {len(rows)} videos existed already.")
        return videos


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Where videos are written."""

    folder: Path
    names: list[str]
    lock: str = WRITER
    recorded: bool = False
    """Whether the folder keeps a record of what each video was drawn from."""

    @classmethod
    def of(cls, out: Path, rows: Sequence[Prompt], *, listed: bool) -> Self:
        """One file, numbered ones, or named ones in a folder of their own.

        Args:
            out: What the user names.
            rows: A prompt for every video.
            listed: Whether the user has named several prompts.

        Raises:
            UserError: if it is neither a video nor a folder, or a video for several prompts.
        """
        if out.is_dir() or not out.suffix:
            return cls(folder=out, names=video_names(rows), recorded=True)
        if out.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"Cannot write '{out}': videos end in .mp4, .gif, .webp or .png, and a folder "
                "has no ending. Change --out."
            )
        if listed and len({row.text for row in rows}) > 1:
            raise UserError(
                f"'{out}' is one file, and there are several prompts. Name a folder: --out "
                f"{quoted(out.with_suffix(''))}"
            )
        numbered = [out.with_stem(f"{out.stem}_{i:02d}").name for i in range(len(rows))]
        names = numbered if len(rows) > 1 else [out.name]
        return cls(folder=out.parent, names=names, lock=f".{out.name}{WRITER}")


def _rows(
    config: Config,
    prompt: str | Sequence[str] | None,
    prompts: Path | str | None,
    num_videos: int,
    seed: int,
    progress: Progress,
) -> list[Prompt]:
    """The prompt and the seed of every video."""
    given = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if prompts is not None:
        if given:
            raise UserError("--prompt and --prompts exclude each other. Leave one of them out.")
        return prompt_table(load_prompts(str(prompts), progress.note), num_videos, seed)
    if given:
        return prompt_table([Prompt(text=text) for text in given], num_videos, seed)
    own = config.backbone.prompts(num_videos)
    return prompt_table([Prompt(text=text) for text in own], 1, seed)


def _draw(
    model: VideoModel,
    row: Prompt,
    context: Context,
    denoiser: nn.Module,
    num_inference_steps: int | None,
    guidance_scale: float | None,
) -> Video:
    latents = model.sample(
        context,
        initial_noise(model, [row.seed or 0]),
        denoiser=denoiser,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        **negative_option(row.negative_prompt),
    )
    returned.checked(model, "samples", latents, (1, *model.latent_shape), finite=False)
    pixels = returned.decoded(model, latents).cpu()
    check_finite(latents, pixels, [row.text])
    return pixels[0]


def _key(
    config: Config,
    model: VideoModel,
    adapter: Path | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
) -> list[Any]:
    """Everything but its prompt and seed that a video depends on."""
    files = [] if adapter is None else sorted(adapter.glob("adapter_*"))
    weights = [file_digest(path) for path in files]
    return [
        model.identity, weights, config.tables["backbone"], config.train.mixed_precision,
        num_inference_steps, guidance_scale,
    ]  # fmt: skip
