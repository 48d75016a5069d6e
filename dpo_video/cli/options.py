"""The flags that several commands share, and what they resolve to."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from dpo_video.workflows.config import Config

console = Console(stderr=True)
_CHOICE, _RUN = "Strategies", "Run"

Pairs = Annotated[
    str | None,
    typer.Option("--pairs", help="How pairs are made (local, jitter, ...), or a folder of pairs.",
                 rich_help_panel=_CHOICE),
]  # fmt: skip
Loss = Annotated[
    str | None, typer.Option("--loss", help="region, global, ...", rich_help_panel=_CHOICE)
]
Reference = Annotated[
    str | None, typer.Option("--reference", help="toggle, copy, cached.", rich_help_panel=_CHOICE)
]
Backbone = Annotated[
    str | None,
    typer.Option("--backbone", help="tiny, animatediff, ...", rich_help_panel=_CHOICE),
]
Labeler = Annotated[
    str | None,
    typer.Option("--labeler", help="Who labels the pairs that need it.", rich_help_panel=_CHOICE),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", help="A metric to report; repeat for more.", rich_help_panel=_CHOICE),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KIND.OPTION=VALUE", rich_help_panel=_CHOICE,
                 help="Any option, as in run.toml: --set loss.beta=500. Repeat for more."),
]  # fmt: skip
File = Annotated[
    Path | None,
    typer.Option("--config", help="A run.toml to start from.", rich_help_panel=_RUN),
]
Clips = Annotated[
    str | None,
    typer.Option("--clips", help="A folder of real videos.", rich_help_panel=_RUN),
]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", help="The caption of clips that have none.", rich_help_panel=_RUN),
]
Seed = Annotated[int | None, typer.Option("--seed", rich_help_panel=_RUN)]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cuda, mps, cpu; the best there is.", rich_help_panel=_RUN),
]
Deterministic = Annotated[
    bool | None,
    typer.Option("--deterministic", help="Equal runs are equal to the bit.", rich_help_panel=_RUN),
]
Tier = Annotated[
    str | None,
    typer.Option("--tier", help="Presets for a card: t4, l4, 4090, a100, h100, or auto for yours.",
                 rich_help_panel=_RUN),
]  # fmt: skip
Count = Annotated[int | None, typer.Option("--count", help="Pairs to build.", rich_help_panel=_RUN)]
Checkpoint = Annotated[
    int | None,
    typer.Option("--checkpoint", help="The checkpoint of this step; the last one if left out."),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def typed() -> str:
    """The command that is running, to be typed again."""
    return shlex.join(["dpo-video", *sys.argv[1:]])


def resolve(
    file: Path | None,
    assignments: list[str] | None,
    *,
    pairs: str | None = None,
    loss: str | None = None,
    reference: str | None = None,
    backbone: str | None = None,
    labeler: str | None = None,
    metrics: list[str] | None = None,
    tier: str | None = None,
    **flags: Any,
) -> Config:
    """The configuration that a command's flags amount to.

    Keyword arguments beyond the kinds are options with flags of their own; `train_steps=5` stands
    for `train.steps`.
    """
    from dpo_video.workflows import config

    return config.resolve(
        file=file,
        choices={
            "pairs": pairs,
            "loss": loss,
            "reference": reference,
            "backbone": backbone,
            "labeler": labeler,
        },
        metrics=metrics or (),
        tier=tier,
        flags={name.replace("_", ".", 1): value for name, value in flags.items()},
        assignments=assignments or (),
    )
