"""MkDocs hooks: option tables from the strategies, and pages and results from outside docs/.

The option pages (`options/KIND.md`) exist only in the built site, so they are always current.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from dpo_video import registry
from dpo_video.workflows import tables as options
from dpo_video.workflows.recipes import find_recipe, recipe_names

ROOT = Path(__file__).parents[1]
# Files of the repository that the site shows too, by their path from the root.
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/trust/found.json")
TITLES = {
    "pairs": "Pairs",
    "labeler": "Labelers",
    "loss": "Losses",
    "reference": "References",
    "timesteps": "Timestep samplers",
    "optimizer": "Optimizers",
    "schedule": "Schedules",
    "listener": "Listeners",
    "check": "Checks of pairs",
    "format": "Export formats",
    "metric": "Metrics",
    "backbone": "Backbones",
}
BASES = {
    "pairs": "PairBuilder",
    "labeler": "Labeler",
    "loss": "Loss",
    "reference": "Reference",
    "timesteps": "TimestepSampler",
    "optimizer": "Optimizer",
    "schedule": "Schedule",
    "listener": "ListenerFactory",
    "check": "PairCheck",
    "format": "AdapterFormat",
    "metric": "Metric",
    "backbone": "Backbone",
}
OURS = "dpo-video "
_OUTSIDE = re.compile(r"\]\(\.\./((?:benchmarks/|CHANGELOG|CONTRIBUTING)[^)\s]*)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the option pages, and what the pages show of the repository."""
    for path in PAGES:
        _add(files, config, path)
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*")):
        if path.is_file():
            _add(files, config, str(path.relative_to(ROOT)))
    for name, text in option_pages().items():
        files.append(File.generated(config, f"options/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave docs/ at the copies that `on_files` has added."""
    depth = page.file.src_uri.count("/")
    return _OUTSIDE.sub(lambda match: f"]({'../' * depth}{match[1]}", markdown)


def option_pages() -> dict[str, str]:
    """The text of every option page by its name: the settings, then the kinds of strategy."""
    tables = {f"`[{name}]`": (model, name) for name, model in options.ENGINES.items()}
    head = (
        "The tables of `run.toml` that belong to no strategy. Set an option with "
        "`--set train.steps=100`, or in a file: `[train]`, `steps = 100`."
    )
    pages = {"settings": _page("Settings", head, tables)}
    for kind, title in TITLES.items():
        found = {
            f"`{listing.name}`": (
                registry.load(kind, listing.name),
                f"{kind}.{listing.name}" if kind in registry.SEVERAL else kind,
            )
            for listing in registry.listings(kind)
            if listing.distribution.startswith(OURS)
        }
        head = (
            f"Every built-in strategy of the kind `{kind}`, with its options and their defaults. "
            f"`dpo-video show {kind} NAME` prints the same."
        )
        pages[kind] = _page(title, head, found) + (
            f"\n## Your own\n\nDerive it from [`{BASES[kind]}`](../api/strategies.md), whose "
            "description says what it must return and what it may declare, name it in the "
            f"entry-point group `dpo_video.{kind}`, and test it by "
            f"[`check_{kind}`](../api/testing.md). `dpo-video new {kind} NAME` writes a package "
            "that does all of it; see [Plugins](../plugins.md).\n"
        )
    pages["recipe"] = _recipe_page()
    return pages


def _recipe_page() -> str:
    parts = [
        "# Recipes",
        "Every value of a recipe, and where it comes from. `dpo-video show recipe NAME` prints the "
        "same.",
    ]
    for name in recipe_names():
        recipe = find_recipe(name)
        parts += [f"## `{name}`", f"{recipe.summary}. Source: {recipe.source}."]
        rows = [
            f"| {group} | `{path}` | {setting.paper or setting.text} | `{setting.text}` "
            f"| {setting.source} | {setting.why} |"
            for group, settings in recipe.groups.items()
            for path, setting in settings.items()
        ]
        head = ["| for | option | paper | here | source | why |", "|---|---|---|---|---|---|"]
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts) + "\n"


def _page(title: str, head: str, models: dict[str, tuple[type[Any], str]]) -> str:
    parts = [f"# {title}", head]
    for name, (model, path) in models.items():
        parts += [f"## {name}", inspect.cleandoc(model.__doc__ or ""), _table(model, path)]
    return "\n\n".join(parts) + "\n"


def _table(model: type[Any], path: str) -> str:
    found = registry.options(model, path)
    if not found:
        return "It has no options."
    rows = [
        f"| `{option.path}` | `{option.type}` | {_default(option.default)} "
        f"| {option.meaning.replace('|', chr(92) + '|')} |"
        for option in found
    ]
    return "\n".join(["| option | type | default | meaning |", "|---|---|---|---|", *rows])


def _default(text: str) -> str:
    return "required" if text == "required" else f"`{text}`"


def _add(files: Files, config: MkDocsConfig, path: str) -> None:
    files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
