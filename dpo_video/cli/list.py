"""`dpo-video list`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from dpo_video.cli.console import DIM, NAME, WARNING, say, show, show_json
from dpo_video.cli.options import Json
from dpo_video.errors import one_line


def list_strategies(
    kind: Annotated[
        str | None,
        typer.Argument(help="pairs, labeler, loss, reference, metric or backbone; or tier."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the installed strategies, built-in ones and plugins', or the tiers of `--tier`."""
    if kind == "tier":
        _list_tiers(as_json)
        return
    from dpo_video.workflows.catalog import list_strategies

    found = list_strategies(kind)
    if as_json:
        show_json(found.to_dict())
        return
    table = _table("kind", "name", "what it is", "from")
    for each in found.kinds:
        rows = [row for row in found.strategies if row.kind == each]
        for row in rows:
            name, summary, package = map(one_line, (row.name, row.summary, row.distribution))
            table.add_row(row.kind, Text(name, NAME), Text(summary), Text(package))
        if not rows:
            table.add_row(each, Text("none", DIM))
    show(table)
    for sentence in found.unreadable:
        say(("Left out", WARNING), f": {sentence}")


def _list_tiers(as_json: bool) -> None:
    from dpo_video.estimation.tiers import tiers

    if as_json:
        show_json([tier.model_dump() for tier in tiers().values()])
        return
    table = _table("tier", "card", "GiB", "TFLOP/s")
    for tier in tiers().values():
        table.add_row(Text(tier.name, NAME), tier.card, f"{tier.memory_gib:g}", f"{tier.tflops:g}")
    show(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table
