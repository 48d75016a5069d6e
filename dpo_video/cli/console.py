"""Text on the terminal: notes on stderr, results on stdout. Nothing is read as rich markup."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from dpo_video.text import printable, quoted, without_credentials

console = Console(stderr=True)
BOLD, WARNING, BAD, DIM, NAME = "bold", "yellow", "bold red", "dim", "cyan"
WIDE = 1000  # columns of a table in a log
Part = str | Text | tuple[str, str]
"""A text, or a text and its style."""


def say(*parts: Part, to: Console | None = None) -> None:
    """Print texts as they are: never as markup, and never wrapped, so that commands can be copied.

    They go to stderr unless another console is given.
    """
    (to or console).print(Text.assemble(*map(_shown, parts)), soft_wrap=True, highlight=False)


def _shown(part: Part) -> Part:
    """A part without credentials and control characters; a Text is the program's own."""
    if isinstance(part, Text):
        return part
    if isinstance(part, str):
        return printable(without_credentials(part))
    return printable(without_credentials(part[0])), part[1]


def show(*results: RenderableType | Part) -> None:
    """Print results to stdout: texts as `say` does, tables as they are."""
    out = Console()
    for result in results:
        if isinstance(result, str | tuple):
            say(result, to=out)
        elif isinstance(result, Table) and not out.is_terminal and "COLUMNS" not in os.environ:
            Console(width=WIDE).print(result, highlight=False)  # a log does not wrap tables
        else:
            out.print(result, highlight=False)


def show_json(values: Any) -> None:
    """Print plain values to stdout as JSON."""
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


def typed() -> str:
    """The running command, to be typed again."""
    return " ".join(["dpo-video", *map(quoted, sys.argv[1:])])
