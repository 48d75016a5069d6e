"""`dpo-video config`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from dpo_video.cli.console import say, show_json
from dpo_video.cli.options import TRAINING, Json, takes


@takes(*TRAINING)
def config(options: dict[str, Any], as_json: Json = False) -> None:
    """Print the resolved configuration of `train` with the same flags, and stop."""
    from dpo_video.registry import local
    from dpo_video.workflows.options import configure

    resolved = configure("train", options, options.pop("pairs"))
    for note in resolved.notes:
        say(note)
    resolved = replace(resolved, tables=local.typed(resolved.tables))  # nothing keeps a copy
    if as_json:
        show_json(resolved.tables)
    else:
        sys.stdout.write(resolved.toml())
