"""`dpo-video generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo_video.cli.options import (
    Assignments,
    Backbone,
    Checkpoint,
    Deterministic,
    Device,
    File,
    Prompt,
    console,
    resolve,
)
from dpo_video.errors import UserError


def generate(
    run: Annotated[
        Path | None, typer.Argument(help="A run, for its tuned model; the base if left out.")
    ] = None,
    checkpoint: Checkpoint = None,
    prompt: Prompt = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the first video.")] = 0,
    count: Annotated[
        int, typer.Option("--count", min=1, help="Videos, each with a seed of its own.")
    ] = 1,
    out: Annotated[
        Path, typer.Option("--out", help="An mp4 or gif; numbered if there are several.")
    ] = Path("video.mp4"),
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Sampling steps.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance", min=0, help="Classifier-free guidance.")
    ] = None,
    backbone: Backbone = None,
    assignments: Assignments = None,
    file: File = None,
    device: Device = None,
    deterministic: Deterministic = None,
) -> None:
    """Generate videos with a run's tuned model, or with the base."""
    if out.suffix.lower() not in (".mp4", ".gif"):
        raise UserError(f"Cannot write '{out}': videos end in .mp4 or .gif. Change --out.")
    if checkpoint is not None and run is None:
        raise UserError("Whose checkpoint? Name the run: dpo-video generate RUN --checkpoint N")
    if run is not None and file is None:
        file = run / "run.toml"
    config = resolve(
        file,
        assignments,
        backbone=backbone,
        run_device=device,
        run_deterministic=deterministic,
    )
    from dpo_video.data.video import write_video
    from dpo_video.diffusion.initial_noise import initial_noise
    from dpo_video.diffusion.sampling import check_drawn
    from dpo_video.evaluation.evaluate import merge_adapter
    from dpo_video.support.atomic import writing
    from dpo_video.training.run_dir import checkpoint_at
    from dpo_video.workflows.session import load_model, pick_device

    adapter = checkpoint_at(run, checkpoint) / "adapter" if run is not None else None
    model = load_model(config, pick_device(config.run.device))
    denoiser = merge_adapter(model, adapter) if adapter else model.denoiser
    prompts = [prompt] * count if prompt else config.backbone.prompts(count)
    for i, text in enumerate(prompts):
        latents = model.sample(
            model.encode_prompts([text]),
            initial_noise(model, [seed + i]),
            denoiser=denoiser,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        )
        videos = model.decode_videos(latents).cpu()
        check_drawn(latents, videos, [text])
        path = out if count == 1 else out.with_stem(f"{out.stem}_{i:02d}")
        scale = max(1, 256 // model.shape.height)
        with writing(path):
            write_video(path, videos[0], model.shape.fps, scale)
        console.print(f"[bold]{path}[/]  seed {seed + i}  {text}", highlight=False)
