"""`dpo-video bench`: starts the benchmarks of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

from dpo_video.errors import UserError


def bench(context: typer.Context) -> None:
    """Run the repository's benchmarks, or compare two of their results.

    Starts `python -m benchmarks.bench` with the same arguments: [SUITE]... --rounds --threads
    --clock --only --quick --tier --out, or --compare OLD NEW --tolerance.
    `dpo-video bench -- --help` explains each one. Suites: memory, step, metric, store, masks, loss,
    startup. Exit code 3 if --compare finds a slower candidate or a larger peak of memory.
    """
    import dpo_video

    places = (Path(dpo_video.__file__).parents[1], Path.cwd())
    root = next((each for each in places if (each / "benchmarks" / "bench.py").is_file()), None)
    if root is None:
        raise UserError(
            "The benchmarks are not in the installed package. Run this command in a clone of the "
            "repository."
        )
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.bench", *context.args]
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
    raise typer.Exit(code)


# It passes every argument on.
bench.context_settings = {  # type: ignore[attr-defined]
    "allow_extra_args": True,
    "ignore_unknown_options": True,
}
