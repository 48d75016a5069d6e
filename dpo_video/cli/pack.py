"""`dpo-video pack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo_video.cli.build import progress_bar
from dpo_video.cli.options import console
from dpo_video.errors import UserError


def pack(
    pairs: Annotated[str, typer.Argument(help="A folder of pairs, or its URL.")],
    folder: Annotated[Path, typer.Argument(help="Where the packed copy goes.")],
    size: Annotated[int, typer.Option("--shard-mib", min=1, help="Size of a file, in MiB.")] = 256,
) -> None:
    """Copy pairs into few large files, to move them or to stream them from a bucket.

    Everything reads the copy as it reads the folder, and a run on the one goes on with the other.
    Labels go along, previews do not. An interrupted call goes on where it was.
    """
    from dpo_video.data.pack import pack as pack_pairs
    from dpo_video.data.store import PairStore

    store = PairStore(pairs)
    if not len(store):
        raise UserError(f"'{store.where}' holds no pairs yet. Build some first: dpo-video build")
    with progress_bar() as bar:
        task = bar.add_task("pairs and prompts", total=None)
        for report in pack_pairs(store, folder, size << 20):
            bar.update(task, completed=report.done, total=report.total)
    files = len(list((folder / "shards").iterdir()))
    console.print(f"{len(store)} pairs in {files} files in [bold]{folder}[/]. "
                  f"Train on them: dpo-video train --pairs {folder}/")  # fmt: skip
