"""Text on the terminal: notes on stderr, results on stdout. Nothing is read as rich markup."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

console = Console(stderr=True)
BOLD, WARNING, BAD, DIM, NAME = "bold", "yellow", "bold red", "dim", "cyan"
Part = str | Text | tuple[str, str]
"""A text, or a text and its style."""


def say(*parts: Part, to: Console | None = None) -> None:
    """Print texts as they are: never as markup, and never wrapped, so that commands can be copied.

    They go to stderr unless another console is given.
    """
    (to or console).print(Text.assemble(*parts), soft_wrap=True, highlight=False)


def show(*results: RenderableType | Part) -> None:
    """Print results to stdout: texts as `say` does, tables as they are."""
    out = Console()
    for result in results:
        if isinstance(result, str | tuple):
            say(result, to=out)
        else:
            out.print(result, highlight=False)


def show_json(values: Any) -> None:
    """Print plain values to stdout as JSON."""
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


def typed() -> str:
    """The running command, to be typed again."""
    return shlex.join(["dpo-video", *sys.argv[1:]])
