"""`dpo-video show`."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from dpo_video.cli.console import BOLD, DIM, NAME, show, show_json
from dpo_video.cli.options import Json
from dpo_video.errors import UserError
from dpo_video.support.formatting import plain_table


def show_strategy(
    kind: Annotated[
        str,
        typer.Argument(help="A kind (see `dpo-video list`), run, build, train, ... or tier."),
    ],
    name: Annotated[str | None, typer.Argument(help="Name of a strategy or tier.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a strategy does, its source, and each option with its type and default."""
    if kind == "tier":
        _show_tier(name, as_json)
        return
    from dpo_video.workflows.catalog import show_strategy

    found = show_strategy(kind, name)
    if as_json:
        show_json(found.to_dict())
        return
    show(
        Text.assemble((kind, BOLD), " ", (name or "", NAME), "\n"),
        Text(_reflowed(found.doc) + "\n"),
    )
    for option in found.options:
        default = option.default if option.default == "required" else f"= {option.default}"
        show(
            Text.assemble((option.path, NAME), "  ", (option.type, DIM), f"  {default}"),
            Padding(Text(option.meaning), (0, 0, 0, 4)),
        )
    if not found.options:
        show("It has no options.")


def _show_tier(name: str | None, as_json: bool) -> None:
    from dpo_video.estimation.tiers import find_tier

    if name is None:
        raise UserError("show tier needs a NAME (see `dpo-video list tier`).")
    tier = find_tier(name)
    if as_json:
        show_json(tier.model_dump())
        return
    rows: list[tuple[str | Text, ...]] = []
    for group, options in {"every backbone": tier.options, **tier.backbone, **tier.model}.items():
        rows.append((Text(group, BOLD),))
        for path, value in options.items():
            text = ", ".join(value) if isinstance(value, list) else str(value)
            rows.append((Text(f"  {path}", NAME), text))
    show(
        Text.assemble(("tier", BOLD), " ", (tier.name, NAME), "\n"),
        f"{tier.card}: {tier.memory_gib:g} GiB, {tier.tflops:g} TFLOP/s ({tier.source}).",
        "Its options override those of --config; --set and other flags override its options. "
        "LoRA's alpha follows the rank.\n",
        plain_table(("option", "value"), rows),
    )


def _reflowed(text: str) -> str:
    """Paragraphs on one line each, for the terminal to break; indented lines stay as they are."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)
