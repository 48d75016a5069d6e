"""`dpo-video show`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo_video.cli.options import Json
from dpo_video.errors import UserError


def show(
    kind: Annotated[
        str, typer.Argument(help="A kind (see `dpo-video list`), or run, build, train, evaluate.")
    ],
    name: Annotated[str | None, typer.Argument(help="A strategy's name.")] = None,
    as_json: Json = False,
) -> None:
    """Show a strategy: what it does, its source, and every option with type and default."""
    from dpo_video import config, registry

    if kind in config.ENGINES:
        model, path = config.ENGINES[kind], kind
    elif name is None:
        registry.check_kind(kind)
        raise UserError(f"Which {kind}? See `dpo-video list {kind}`.")
    else:
        model = registry.load(registry.check_kind(kind), name)
        path = f"metric.{name}" if kind == "metric" else kind
    options = registry.options(model, path)
    text = inspect.cleandoc(model.__doc__ or "")
    if as_json:
        found = {"kind": kind, "name": name, "doc": text,
                 "options": [dataclasses.asdict(option) for option in options]}  # fmt: skip
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    shown = escape(_reflowed(text))
    console.print(f"[bold]{kind}[/] [cyan]{name or ''}[/]\n\n{shown}\n", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("option", "type", "default", "meaning"):
        table.add_column(column)
    for option in options:
        table.add_row(f"[cyan]{option.path}[/]", escape(option.type), escape(option.default),
                      escape(option.meaning))  # fmt: skip
    console.print(table if options else "It has no options.")


def _reflowed(text: str) -> str:
    """Paragraphs as one line each, for the terminal to break; what is indented stays as it is."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)
