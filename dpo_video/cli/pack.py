"""`dpo-video pack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo_video.cli.console import BOLD, say
from dpo_video.support.formatting import counted


def pack(
    pairs: Annotated[str, typer.Argument(help="Folder or URL of finished pairs.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the packed copy.")],
    shard_mib: Annotated[
        int, typer.Option("--shard-mib", min=1, help="Size of a file in MiB.")
    ] = 256,
) -> None:
    """Copy pairs into a few large files, to move them or to stream them from a bucket.

    The copy is read like the original, and a run on one can be resumed on the other. Labels are
    copied, previews are not. Run an interrupted command again to complete the copy.
    """
    from dpo_video.cli.display import TerminalProgress
    from dpo_video.workflows.pairs import next_step, pack

    with TerminalProgress() as progress:
        store = pack(pairs, folder, shard_mib=shard_mib, progress=progress)
    files = len(list((folder / "shards").iterdir()))
    say(
        f"{counted(len(store), 'pair')} in {counted(files, 'file')} in ",
        (str(folder), BOLD),
        f". {next_step(store)}",
    )
