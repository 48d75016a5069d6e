"""`dpo-video generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_video.cli.options import option, takes


@takes(
    "backbone", "set", "config", "prompt", "seed", "num_inference_steps", "guidance_scale",
    "checkpoint", "device", "deterministic",
)  # fmt: skip
def generate(
    options: dict[str, Any],
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run; without one the base model generates."),
    ] = None,
    num_videos: Annotated[
        int, option("--num-videos", "Number of videos, each with the next seed.", min=1)
    ] = 1,
    out: Annotated[
        Path | None,
        option("--out", "File ending in .mp4 or .gif, numbered; by default video.mp4."),
    ] = None,
) -> None:
    """Generate videos with a run's tuned model, or with a base model."""
    from dpo_video.cli.display import TerminalProgress
    from dpo_video.workflows.generate import generate

    with TerminalProgress() as progress:
        generate(
            run, num_videos=num_videos, out=out or Path("video.mp4"), progress=progress, **options
        )
