"""`dpo-video evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_video.cli.console import BOLD, DIM, say, show, typed
from dpo_video.cli.options import Json, option, takes


@takes(
    "prompts", "num_prompts", "num_videos_per_prompt", "batch_size", "metrics", "min_effect",
    "tolerance", "min_prompts", "backbone", "set", "config", "allow_code", "tier", "device",
    "deterministic", "checkpoint",
)  # fmt: skip
def evaluate(
    options: dict[str, Any],
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run; or name --lora, or --base and --tuned."),
    ] = None,
    lora: Annotated[
        str | None,
        option(
            "--lora",
            "Instead of a run, a LoRA of any origin for --backbone: a .safetensors file, a folder, "
            "or a hub id.",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        option("--base", "Instead of a run, a folder of finished videos of the base model."),
    ] = None,
    tuned: Annotated[
        Path | None, option("--tuned", "With --base, a folder of videos of the same names.")
    ] = None,
    page: Annotated[
        bool,
        option("--page", "Afterwards, let people compare both blindly on the labelling page."),
    ] = False,
    out: Annotated[
        Path | None,
        option("--out", "Folder to write; by default RUN/evaluation, or RUN/evaluation-STEP."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a tuned model with its base on identical prompts and seeds.

    The tuned model is a run's, or a LoRA's (--lora), or there are finished videos of both (--base,
    --tuned). Writes evaluation.json, the videos of both models and a page, index.html. Finished
    videos are not drawn again: after an interruption the same command resumes. Processes that
    `accelerate launch -m dpo_video evaluate` starts share the videos.
    """
    from dpo_video.cli.display import TerminalProgress
    from dpo_video.workflows.distributed import is_main_process
    from dpo_video.workflows.evaluate import evaluate, evaluation_folder

    with TerminalProgress() as progress:
        evaluation = evaluate(
            run, lora=lora, base=base, tuned=tuned, page=page, out=out, command=typed(),
            progress=progress, **options,
        )  # fmt: skip
    if not is_main_process():
        return
    if as_json:
        typer.echo(evaluation.to_json())
        return
    show(evaluation.table())
    for detail in evaluation.verdict.details:
        say(("- ", DIM), detail)
    if evaluation.preference is not None:
        say(("- ", DIM), evaluation.preference.text)
    folder = evaluation_folder(run, options["checkpoint"], out, lora=lora, tuned=tuned)
    say("\nOpen the page: ", (str(folder / "index.html"), BOLD))
