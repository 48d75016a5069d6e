"""The flags that several commands share, each declared once, in groups that a command takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

STRATEGIES, RUN = "Strategies", "Run"


def _names_of(kind: str) -> Callable[[str], list[str]]:
    """Shell completion by the names of a kind's installed strategies."""

    def complete(incomplete: str) -> list[str]:
        from dpo_video import registry

        names = [listing.name for listing in registry.listings(kind)]
        return [name for name in names if name.startswith(incomplete)]

    return complete


def _tiers(incomplete: str) -> list[str]:
    from dpo_video.estimation.tiers import AUTO, tiers

    return [name for name in (*tiers(), AUTO) if name.startswith(incomplete)]


def _flag(type_: Any, name: str, help_: str, panel: str | None = None, **more: Any) -> Any:
    return Annotated[type_, typer.Option(name, help=help_, rich_help_panel=panel, **more)]


def _strategy(name: str, help_: str, type_: Any = str | None) -> Any:
    return _flag(type_, f"--{name}", help_, STRATEGIES, autocompletion=_names_of(name))


Flags = Mapping[str, Any]
"""Keyword of a workflow to the flag that gives it."""

SET: Flags = {
    "set": _flag(
        list[str] | None,
        "--set",
        "Set any option by its path, as in --set loss.beta=500; repeat for more.",
        STRATEGIES,
        metavar="TABLE.OPTION=VALUE",
    ),
}
CONFIG: Flags = {
    "config": _flag(
        Path | None, "--config", "Start from the options of a TOML file, such as a run.toml.", RUN
    ),
}
DEVICE: Flags = {
    "device": _flag(
        str | None, "--device", "Device: cuda, cuda:N, mps or cpu; by default the best one.", RUN
    ),
}
DETERMINISTIC: Flags = {
    "deterministic": _flag(
        bool | None,
        "--deterministic",
        "Use deterministic kernels; identical runs give identical bits.",
        RUN,
    ),
}
BACKBONE: Flags = {"backbone": _strategy("backbone", "Family of the video diffusion model.")}
LABELER: Flags = {"labeler": _strategy("labeler", "Labeler that judges which video is better.")}
METRICS: Flags = {
    "metrics": _strategy("metric", "Metric to evaluate; repeat for more.", list[str] | None)
}
LOSS: Flags = {
    "loss": _strategy("loss", "Loss to train with."),
    "reference": _strategy("reference", "Where the reference predictions come from."),
}
PAIRS: Flags = {
    "pairs": _strategy("pairs", "Pair builder, or a folder or URL of finished pairs."),
}
PROMPT: Flags = {
    "prompt": _flag(
        str | None, "--prompt", "Prompt of the videos, and caption of clips that have none.", RUN
    ),
}
SEED: Flags = {"seed": _flag(int | None, "--seed", "Seed of the random draws.", RUN)}
TIER: Flags = {
    "tier": _flag(
        str | None,
        "--tier",
        "Use the presets for a card: t4, l4, 4090, a100, h100, or auto for this machine's.",
        RUN,
        autocompletion=_tiers,
    ),
}
SOURCE: Flags = {
    "clips": _flag(str | None, "--clips", "Folder of real videos, or one video.", RUN),
    **PROMPT,
    "count": _flag(int | None, "--count", "Number of pairs to build.", RUN),
}
STEPS: Flags = {"steps": _flag(int | None, "--steps", "Number of optimizer steps.", RUN, min=1)}
LABELS: Flags = {
    "labels": _flag(
        list[str] | None,
        "--labels",
        "Labels to use instead of the pairs' own; repeat for a vote.",
        RUN,
    ),
}
SEEDS: Flags = {
    "seeds": _flag(
        int | None, "--seeds", "Number of videos of each model, one seed per video.", RUN, min=2
    ),
}
JUDGING: Flags = {
    "min_effect": _flag(
        float | None, "--min-effect", "Least relative change of a target that counts.", RUN, min=0
    ),
    "tolerance": _flag(
        float | None,
        "--tolerance",
        "Relative loss of motion or of a guard that still counts as keeping it.",
        RUN,
        min=0,
    ),
    "min_prompts": _flag(
        int | None, "--min-prompts", "Number of prompts that a verdict needs.", RUN, min=2
    ),
}
EVALUATION_PROMPTS: Flags = {
    "prompts": _flag(
        str | None, "--prompts", "Text file of evaluation prompts, one per line.", RUN
    ),
}
CHECKPOINT: Flags = {
    "checkpoint": _flag(
        int | None, "--checkpoint", "Step of the checkpoint; by default the last one.", RUN
    ),
}
SAMPLING: Flags = {
    "num_inference_steps": _flag(
        int | None,
        "--num-inference-steps",
        "Number of sampling steps; by default the backbone's own.",
        RUN,
        min=1,
    ),
    "guidance_scale": _flag(
        float | None,
        "--guidance-scale",
        "Classifier-free guidance scale; by default the backbone's own.",
        RUN,
        min=0,
    ),
}
# `config` shows what `train` would run, so that both take exactly these.
BUILDING: Flags = {
    **PAIRS, **BACKBONE, **LABELER, **SET, **CONFIG, **TIER, **SEED, **DEVICE, **DETERMINISTIC,
    **SOURCE,
}  # fmt: skip
TRAINING: Flags = {**BUILDING, **LOSS, **METRICS, **STEPS, **LABELS}

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Tier = TIER["tier"]


def takes(*groups: Flags) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of groups; it receives their values as its `options`, by keyword."""
    flags = {name: flag for group in groups for name, flag in group.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            options = {name: given.pop(name) for name in flags}
            command(options=options, **given)

        keyword = inspect.Parameter.KEYWORD_ONLY
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [each.replace(kind=keyword) for each in own if each.name != "options"]
        parameters += [
            inspect.Parameter(name, keyword, default=None, annotation=flag)
            for name, flag in flags.items()
        ]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate
