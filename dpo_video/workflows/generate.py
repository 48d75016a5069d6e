"""Generate videos with a run's tuned model, or with a base model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Unpack

from dpo_video.data.video_writer import write_video
from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.diffusion.sampling import check_finite
from dpo_video.errors import UserError
from dpo_video.evaluation.adapter import put_on
from dpo_video.support.atomic import writing
from dpo_video.support.claims import WRITER, claim
from dpo_video.training.checkpoint import kept_adapter
from dpo_video.workflows.options import Options, checked, configure, with_options
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.results import GeneratedVideo
from dpo_video.workflows.runs import Run
from dpo_video.workflows.session import load_model, pick_device


@with_options
@checked
def generate(
    run: Run | Path | str | None = None,
    *,
    prompt: str | None = None,
    seed: int | None = None,
    num_videos: int = 1,
    out: Path | str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    checkpoint: int | None = None,
    progress: Progress = SILENT,
    **options: Unpack[Options],
) -> list[GeneratedVideo]:
    """Generate videos with a run's tuned model, or with a base model.

    Args:
        run: The run or its folder; None for the base model of `backbone`.
        prompt: The prompt of all videos; by default the backbone's evaluation prompts.
        seed: Seed of the first video, 0 by default; each further video takes the next one.
        num_videos: Number of videos.
        out: An .mp4 or .gif file, numbered if there are several videos; None writes no file.
        num_inference_steps: Sampling steps; the backbone's own number by default.
        guidance_scale: Classifier-free guidance; the backbone's own by default.
        checkpoint: The step of the run to take; the last checkpoint by default.
        progress: Receives the progress.
        options: See `Options`.

    Raises:
        UserError: for a wrong option, or a video that is not finite.
        RunError: if there is no such run or checkpoint.
        BusyError: if another process is writing `out`.
    """
    file = None if out is None else Path(out)
    if file is not None and file.suffix.lower() not in (".mp4", ".gif"):
        raise UserError(f"Cannot write '{file}': videos end in .mp4 or .gif. Change --out.")
    if checkpoint is not None and run is None:
        raise UserError("--checkpoint needs a run: dpo-video generate RUN --checkpoint N")
    if run is not None:
        run = Run.open(run)
        options["config"] = options.get("config") or run.folder / "run.toml"
    config = configure("evaluate", options, kinds=("backbone",))
    with ExitStack() as stack:
        adapter = None
        if run is not None:
            adapter = stack.enter_context(kept_adapter(run.folder, checkpoint))
        if file is not None:
            name = f".{file.name}{WRITER}"
            stack.enter_context(claim(file.parent, name, instead="name another file with --out"))
        model = load_model(config, pick_device(config.run.device))
        denoiser = put_on(model, adapter) if adapter else model.denoiser
        prompts = [prompt] * num_videos if prompt else config.backbone.prompts(num_videos)
        videos = []
        for i, text in enumerate(prompts):
            number = (seed or 0) + i
            latents = model.sample(
                model.encode_prompts([text]),
                initial_noise(model, [number]),
                denoiser=denoiser,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            )
            pixels = model.decode_videos(latents).cpu()
            check_finite(latents, pixels, [text])
            path = file
            if file is not None and num_videos > 1:
                path = file.with_stem(f"{file.stem}_{i:02d}")
            if path is not None:
                with writing(path):
                    scale = max(1, 256 // model.shape.height)
                    write_video(path, pixels[0], model.shape.fps, scale)
                progress.note(f"{path}  seed {number}  {text}")
            progress.update("videos", i + 1, num_videos)
            videos.append(
                GeneratedVideo(
                    prompt=text, seed=number, fps=model.shape.fps, video=pixels[0], path=path
                )
            )
        return videos
