"""The flags that several commands share, each declared once, and the groups of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_video.paths import PROMPT_LISTS

STRATEGIES, RUN = "Strategies", "Run"


def option(name: str, help_: str, *, panel: str = RUN, **more: Any) -> Any:
    """A flag, for the annotation of a command's parameter."""
    return typer.Option(name, help=help_, rich_help_panel=panel, **more)


def _flag(type_: Any, name: str, help_: str, **more: Any) -> Any:
    """The annotation of a parameter that is None without the flag."""
    return Annotated[type_ | None, option(name, help_, **more)]


def _strategy(kind: str, help_: str, type_: Any = str) -> Any:
    """The flag of a kind of strategy, completed by the names of the installed ones."""
    return _flag(type_, f"--{kind}", help_, panel=STRATEGIES, autocompletion=completed(kind))


def completed(kind: str) -> Callable[[str], list[str]]:
    """Completes the names of a kind."""

    def complete(incomplete: str) -> list[str]:
        from dpo_video import registry

        names = [listing.name for listing in registry.listings(kind)]
        return [name for name in names if name.startswith(incomplete)]

    return complete


def _tiers(incomplete: str) -> list[str]:
    from dpo_video.estimation.tiers import AUTO, tiers

    return [name for name in (*tiers(), AUTO) if name.startswith(incomplete)]


def _recipes(incomplete: str) -> list[str]:
    from dpo_video.workflows.recipes import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def _prompt_lists(incomplete: str) -> list[str]:
    return [name for name in PROMPT_LISTS if name.startswith(incomplete)]


FLAGS: Mapping[str, Any] = {
    "recipe": _flag(
        str,
        "--recipe",
        "Use the hyper-parameters of a paper: video-dpo, densedpo, localdpo (see list recipe).",
        panel=STRATEGIES,
        autocompletion=_recipes,
    ),
    "pairs": _strategy("pairs", "Pair builder, or a folder or URL of finished pairs."),
    "backbone": _strategy("backbone", "Family of the video diffusion model."),
    "labeler": _strategy("labeler", "Labeler that judges which video is better."),
    "loss": _strategy("loss", "Loss to train with."),
    "reference": _strategy("reference", "Where the reference predictions come from."),
    "timesteps": _strategy("timesteps", "Distribution of the training timesteps."),
    "optimizer": _strategy("optimizer", "Optimizer of the adapter."),
    "schedule": _strategy("schedule", "Schedule of the learning rate."),
    "listeners": _strategy(
        "listener", "Listener of the training, such as early_stop; repeat for more.", list[str]
    ),
    "checks": _strategy(
        "check", "Check of the pairs; repeat for more. +NAME adds it to the usual ones.", list[str]
    ),
    "metrics": _strategy(
        "metric", "Metric to evaluate; repeat for more. +NAME adds it to the usual ones.", list[str]
    ),
    "set": _flag(
        list[str],
        "--set",
        "Set any option by its path, as in --set loss.beta=500; repeat for more.",
        panel=STRATEGIES,
        metavar="TABLE.OPTION=VALUE",
    ),
    "config": _flag(Path, "--config", "Start from the options of a TOML file, such as a run.toml."),
    "allow_code": _flag(
        bool,
        "--allow-code",
        "Run the Python files that the run or --config names as strategies; read them first.",
    ),
    "tier": _flag(
        str,
        "--tier",
        "Use the presets for a card: t4, l4, 4090, a100, h100, or auto for this machine's.",
        autocompletion=_tiers,
    ),
    "seed": _flag(int, "--seed", "Seed of the random draws."),
    "device": _flag(str, "--device", "Device: cuda, cuda:N, mps or cpu; by default the best one."),
    "deterministic": _flag(
        bool,
        "--deterministic",
        "Use deterministic kernels; identical runs give identical bits.",
    ),
    "clips": _flag(str, "--clips", "Folder of real videos, or one video."),
    "prompt": _flag(
        list[str], "--prompt", "Prompt of the videos, and caption of clips that have none."
    ),
    "count": _flag(int, "--count", "Number of pairs to build."),
    "steps": _flag(int, "--steps", "Number of optimizer steps.", min=1),
    "labels": _flag(
        list[str], "--labels", "Labels to use instead of the pairs' own; repeat for a vote."
    ),
    "num_prompts": _flag(
        int, "--num-prompts", "Number of prompts; by default all, or 47 of the backbone's.", min=1
    ),
    "num_videos_per_prompt": _flag(
        int,
        "--num-videos-per-prompt",
        "Number of videos of each prompt and model, each with its own seed; 1 by default.",
        min=1,
    ),
    "batch_size": _flag(
        int, "--batch-size", "Videos that are sampled at once; 1 by default.", min=1
    ),
    "min_effect": _flag(float, "--min-effect", "Least relative change of a target that counts."),
    "tolerance": _flag(
        float,
        "--tolerance",
        "Relative loss of motion or of a guard that still counts as keeping it.",
    ),
    "min_prompts": _flag(int, "--min-prompts", "Number of prompts that a verdict needs.", min=2),
    "prompts": _flag(
        str,
        "--prompts",
        "File of prompts: one per line, .csv or .jsonl; or training or evaluation, the package's "
        "lists.",
        autocompletion=_prompt_lists,
    ),
    "rebuild": _flag(
        bool, "--rebuild", "Build pairs again that another version has built; those are kept."
    ),
    "accept_pairs": _flag(
        bool, "--accept-pairs", "Use pairs that another version of their builder has built."
    ),
    "checkpoint": _flag(int, "--checkpoint", "Step of the checkpoint; by default the last one."),
    "num_inference_steps": _flag(
        int,
        "--num-inference-steps",
        "Number of sampling steps; by default the backbone's own.",
        min=1,
    ),
    "guidance_scale": _flag(
        float,
        "--guidance-scale",
        "Classifier-free guidance scale; by default the backbone's own.",
    ),
}
"""Keyword of a workflow to the flag that gives it."""
# `config` shows what `train` would run, so that both take exactly these.
BUILDING = (
    "recipe", "pairs", "backbone", "labeler", "set", "config", "allow_code", "tier", "seed",
    "device", "deterministic", "clips", "prompt", "prompts", "count",
    "rebuild", "accept_pairs",
)  # fmt: skip
TRAINING = (
    *BUILDING, "loss", "reference", "timesteps", "optimizer", "schedule", "listeners",
    "metrics", "steps", "labels",
)  # fmt: skip

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def takes(*flags: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command flags of `FLAGS`; it receives their values as its `options`, by keyword."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            options = {name: given.pop(name) for name in flags}
            _check_names(options)
            command(options=options, **given)

        keyword = inspect.Parameter.KEYWORD_ONLY
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [each.replace(kind=keyword) for each in own if each.name != "options"]
        parameters += [
            inspect.Parameter(name, keyword, default=None, annotation=FLAGS[name]) for name in flags
        ]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def _check_names(options: Mapping[str, Any]) -> None:
    """Refuse unknown strategies and tiers before the libraries are imported, which takes long."""
    from dpo_video import registry
    from dpo_video.estimation.tiers import AUTO, find_tier
    from dpo_video.workflows.recipes import find_recipe

    named = [(kind, options.get(kind)) for kind in registry.KINDS]
    for kind in registry.SEVERAL:
        named += [(kind, name.removeprefix("+")) for name in options.get(f"{kind}s") or ()]
    named += _names_in(options.get("config"))
    for kind, name in named:
        if isinstance(name, str) and not (kind == "pairs" and registry.is_store(name)):
            registry.check_name(kind, name)
    if (tier := options.get("tier")) not in (None, AUTO):
        find_tier(tier)
    if recipe := options.get("recipe"):
        find_recipe(recipe)


def _names_in(config: Path | None) -> list[tuple[str, Any]]:
    """Kinds and names of the strategies in a TOML file; none if it cannot be read.

    None of a run.toml either: what reads it names the packages that are missing.
    """
    from dpo_video import registry
    from dpo_video.support.reading import read_toml

    try:
        tables = read_toml(config) if config else {}
    except (OSError, ValueError):
        return []
    if "versions" in tables:
        return []
    tables = {kind: table for kind, table in tables.items() if isinstance(table, dict)}
    named = [(kind, name) for kind in registry.SEVERAL for name in tables.pop(kind, {})]
    return named + [(kind, tables[kind].get("name")) for kind in registry.KINDS if kind in tables]
