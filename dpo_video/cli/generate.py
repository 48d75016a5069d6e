"""`dpo-video generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_video.cli.options import option, takes


@takes(
    "pairs", "backbone", "set", "config", "allow_code", "prompt", "prompts", "seed",
    "num_inference_steps", "guidance_scale", "checkpoint", "device", "deterministic",
)  # fmt: skip
def generate(
    options: dict[str, Any],
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run; without it and --lora the base model generates."),
    ] = None,
    lora: Annotated[
        str | None,
        option(
            "--lora",
            "Instead of a run, a LoRA of any origin for --backbone: a .safetensors file, a folder, "
            "or a hub id.",
        ),
    ] = None,
    num_videos: Annotated[
        int, option("--num-videos", "Number of videos of each prompt, with the next seeds.", min=1)
    ] = 1,
    out: Annotated[
        Path | None,
        option(
            "--out",
            "Folder of the videos, or file ending in .mp4, .gif, .webp or .png (a sheet of all "
            "frames); by default video.mp4, or videos for several prompts.",
        ),
    ] = None,
) -> None:
    """Generate videos with a run's tuned model, with a LoRA, or with the base model.

    The base model is that of --backbone, or of finished pairs (--pairs).

    A folder gets a named file for every prompt and seed, and a metadata.jsonl. Videos that exist
    there are not drawn again, so an interrupted command is run again to draw the rest.
    """
    from dpo_video.cli.display import TerminalProgress
    from dpo_video.workflows.generate import generate

    several = options["prompts"] is not None or len(options["prompt"] or ()) > 1
    with TerminalProgress() as progress:
        generate(
            run,
            lora=lora,
            num_videos=num_videos,
            out=out or Path("videos" if several else "video.mp4"),
            progress=progress,
            **options,
        )
