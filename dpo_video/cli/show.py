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
        typer.Argument(help="A kind (see `dpo-video list`), run, build, train, ..., or tier."),
    ],
    name: Annotated[
        str | None, typer.Argument(help="Name of a strategy, a recipe or a tier.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a strategy does, its source, and each option with its type and default.

    A recipe is shown with the source of each of its values.
    """
    if kind in ("tier", "recipe"):
        if name is None:
            raise UserError(f"show {kind} needs a NAME (see `dpo-video list {kind}`).")
        (_show_tier if kind == "tier" else _show_recipe)(name, as_json)
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


def _show_recipe(name: str, as_json: bool) -> None:
    from dpo_video.workflows.recipes import find_recipe

    recipe = find_recipe(name)
    if as_json:
        show_json(recipe.model_dump())
        return
    rows: list[tuple[str | Text, ...]] = []
    for group, settings in recipe.groups.items():
        if settings:
            rows.append((Text(group, BOLD),))
        for path, setting in settings.items():
            source = setting.source
            if setting.paper is not None:
                source += f" (published: {setting.paper}; {setting.why})"
            rows.append((Text(f"  {path}", NAME), setting.text, source))
    show(
        Text.assemble(("recipe", BOLD), " ", (recipe.name, NAME), "\n"),
        f"{recipe.summary}. Source: {recipe.source}.",
        "Its values override a backbone's defaults. Those of --tier, --config and flags override "
        "them.\n",
        plain_table(("option", "value", "source"), rows),
    )


def _show_tier(name: str, as_json: bool) -> None:
    from dpo_video.estimation.tiers import find_tier

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
        "Its options override a recipe's, of which it lowers numbers and raises none; --config, "
        "--set and other flags override its options. LoRA's alpha follows the rank.\n",
        plain_table(("option", "value"), rows),
    )


def _reflowed(text: str) -> str:
    """Paragraphs on one line each, for the terminal to break; indented lines stay as they are."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)
