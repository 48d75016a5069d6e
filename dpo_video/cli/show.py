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
from rich.padding import Padding
from rich.table import Table

from dpo_video.cli.options import Json
from dpo_video.errors import UserError


def show(
    kind: Annotated[
        str,
        typer.Argument(help="A kind (see `dpo-video list`), run, build, train, ... or tier."),
    ],
    name: Annotated[str | None, typer.Argument(help="A strategy's or a tier's name.")] = None,
    as_json: Json = False,
) -> None:
    """Show a strategy: what it does, its source, and every option with type and default."""
    from dpo_video import registry
    from dpo_video.workflows import config

    if kind == "tier":
        _show_tier(name, as_json)
        return
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
    for option in options:
        given = option.default if option.default == "required" else f"= {escape(option.default)}"
        console.print(
            f"[cyan]{option.path}[/]  [dim]{escape(option.type)}[/]  {given}", highlight=False
        )
        console.print(Padding(escape(option.meaning), (0, 0, 0, 4)), highlight=False)
    if not options:
        console.print("It has no options.")


def _show_tier(name: str | None, as_json: bool) -> None:
    from dpo_video.estimation.tiers import find_tier

    if name is None:
        raise UserError("Which tier? See `dpo-video list tier`.")
    tier = find_tier(name)
    if as_json:
        typer.echo(tier.model_dump_json(indent=2))
        return
    console = Console()
    console.print(
        f"[bold]tier[/] [cyan]{tier.name}[/]\n\n{tier.card}: {tier.memory_gib:g} GiB, "
        f"{tier.tflops:g} TFLOP/s ({tier.source}).\nIts options stand over those of --config, and "
        "below --set and other flags. LoRA's alpha goes along with the rank.\n",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("option", "value"):
        table.add_column(column)
    for whose, options in {"every backbone": tier.options, **tier.backbone, **tier.model}.items():
        table.add_row(f"[bold]{whose}[/]")
        for path, value in options.items():
            said = ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(f"  [cyan]{path}[/]", said)
    console.print(table)


def _reflowed(text: str) -> str:
    """Paragraphs as one line each, for the terminal to break; what is indented stays as it is."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)
