"""`dpo-video list`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo_video.cli.options import Json, console
from dpo_video.errors import one_line


def list_strategies(
    kind: Annotated[
        str | None,
        typer.Argument(help="pairs, labeler, loss, reference, metric or backbone; or tier."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List what is installed, built in or by plugins; or the tiers of `--tier`."""
    from dpo_video import registry
    from dpo_video.registry.entry_points import unreadable

    if kind == "tier":
        _list_tiers(as_json)
        return

    kinds = [registry.check_kind(kind)] if kind else registry.KINDS
    found = [listing for each in kinds for listing in registry.listings(each)]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(listing) for listing in found], indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("kind", "name", "what it is", "from"):
        table.add_column(column)
    for each in kinds:
        rows = [listing for listing in found if listing.kind == each]
        for row in rows:
            name, summary, distribution = (
                escape(one_line(text)) for text in (row.name, row.summary, row.distribution)
            )
            table.add_row(row.kind, f"[cyan]{name}[/]", summary, distribution)
        if not rows:
            table.add_row(each, "[dim]none[/]", "", "")
    Console().print(table)
    for sentence in unreadable():
        console.print(f"[yellow]Left out[/]: {escape(sentence)}", highlight=False, soft_wrap=True)


def _list_tiers(as_json: bool) -> None:
    from dpo_video.estimation.tiers import tiers

    if as_json:
        typer.echo(json.dumps([tier.model_dump() for tier in tiers().values()], indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tier", "card", "GiB", "TFLOP/s"):
        table.add_column(column)
    for tier in tiers().values():
        table.add_row(
            f"[cyan]{tier.name}[/]", tier.card, f"{tier.memory_gib:g}", f"{tier.tflops:g}"
        )
    Console().print(table)
