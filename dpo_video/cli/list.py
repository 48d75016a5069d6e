"""`dpo-video list`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from dpo_video.cli.console import DIM, NAME, WARNING, say, show, show_json
from dpo_video.cli.options import Json
from dpo_video.support.formatting import plain_table
from dpo_video.text import one_line


def list_strategies(
    kind: Annotated[
        str | None,
        typer.Argument(help="A kind, such as loss, metric, recipe, tier or model."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the installed strategies and recipes, the tiers of `--tier`, or known models."""
    if kind in ("tier", "model"):
        (_list_tiers if kind == "tier" else _list_models)(as_json)
        return
    from dpo_video.cli import COMMANDS
    from dpo_video.workflows.catalog import list_strategies

    found = list_strategies(kind)
    if as_json:
        show_json(found.to_dict())
        return
    rows: list[tuple[str | Text, ...]] = []
    for each in found.kinds:
        listed = [row for row in found.strategies if row.kind == each]
        for row in listed:
            name, summary, package = map(one_line, (row.name, row.summary, row.distribution))
            note = row.note
            if each == "command" and name in COMMANDS:
                note = f"hidden by the built-in; run it as {package.split()[0]}:{name}"
            about = Text(f"({note})", WARNING) if note else summary
            rows.append((row.kind, Text(name, NAME), about, package))
        if not listed:
            rows.append((each, Text("none", DIM)))
    show(plain_table(("kind", "name", "what it is", "from"), rows))
    for sentence in found.unreadable:
        say(("Left out", WARNING), f": {sentence}")


def _list_tiers(as_json: bool) -> None:
    from dpo_video.estimation.tiers import tiers

    if as_json:
        show_json([tier.model_dump() for tier in tiers().values()])
        return
    rows = [
        (
            Text(tier.name, NAME),
            tier.card,
            f"{tier.memory_gib:g}",
            f"{tier.tflops:g}",
            tier.distribution,
        )
        for tier in tiers().values()
    ]
    show(plain_table(("tier", "card", "GiB", "TFLOP/s", "from"), rows))


def _list_models(as_json: bool) -> None:
    from dpo_video.diffusion.known_models import known_models

    rows = [
        (each.name, each.backbone, each.hub[0] if each.hub else "", each.distribution)
        for each in known_models()
    ]
    head = ("model", "backbone", "on the hub", "from")
    if as_json:
        show_json([dict(zip(head, row, strict=True)) for row in rows])
        return
    show(plain_table(head, [(Text(one_line(name), NAME), *rest) for name, *rest in rows]))
