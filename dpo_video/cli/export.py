"""`dpo-video export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_video.cli.console import BOLD, say
from dpo_video.cli.options import completed, option, takes


class Precision(StrEnum):
    """Precision of the weights in the files."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


@takes("checkpoint", "allow_code", "device", "set")
def export(
    options: dict[str, Any],
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    target: Annotated[
        str,
        option(
            "--format",
            "Format: diffusers for load_lora_weights, peft for PeftModel.from_pretrained, "
            "comfyui for ComfyUI, merged for a complete checkpoint that contains the adapter; or a "
            "plugin's.",
            autocompletion=completed("format"),
        ),
    ] = "diffusers",
    out: Annotated[
        Path | None, option("--out", "New folder; by default RUN/export/FORMAT-STEP.")
    ] = None,
    dtype: Annotated[
        Precision | None,
        option(
            "--dtype",
            "Precision of the weights in the files; by default their own, fp32 for merged.",
        ),
    ] = None,
) -> None:
    """Write a run's adapter so that other programs load it, with a model card.

    The export is loaded back and compared with the run before its folder gets its name.
    """
    from dpo_video.registry import check_name

    check_name("format", target)
    from dpo_video.workflows.export import export

    done = export(run, target, out, dtype=dtype.value if dtype else None, **options)
    say(
        f"Loaded back and compared: the predictions differ by {done.check.difference:.2g} of their "
        f"size; the adapter changes them by {done.check.change:.2g}."
    )
    if not done.check.change:
        say(
            "The adapter changes nothing: its training has not moved the model. `dpo-video train` "
            "prints what to change when it ends."
        )
    if target == "merged":
        say(
            f"Rounding the merged weights makes an error of {done.check.rounded:.2g} of the "
            "adapter's update."
        )
    say("How to load it: ", (str(done.card), BOLD))
