"""`dpo-video export-pairs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_video.cli.console import BOLD, WARNING, say
from dpo_video.cli.options import takes
from dpo_video.support.formatting import counted


@takes("labels")
def export_pairs(
    options: dict[str, Any],
    pairs: Annotated[str, typer.Argument(help="Folder or URL of finished pairs.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the files.")],
) -> None:
    """Write pairs as the pair_00000.pt files that Video-DPO publishes, with their prompts.

    The format has a chosen and a rejected video only: ties are left out, labels that differ between
    frames become their majority, and regions and the samples between of groups are lost. The
    command reports what was lost.
    """
    from dpo_video.workflows.pairs import export_pairs

    done = export_pairs(pairs, folder, **options)
    say(f"{counted(done.written, 'pair')} in ", (str(folder), BOLD))
    for count, what in (
        (done.undecided, "left out: neither video is preferred"),
        (done.simplified, "written by the majority of their labels, which differ between frames"),
        (done.regions, "written without their region"),
        (done.groups, "written without the samples between the best and the worst"),
    ):
        if count:
            say((str(count), WARNING), f" {what}")
