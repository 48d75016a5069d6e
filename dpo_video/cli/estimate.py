"""`dpo-video estimate`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from dpo_video.cli.options import (
    Assignments,
    Backbone,
    File,
    Json,
    Loss,
    Reference,
    Tier,
    console,
    resolve,
)
from dpo_video.errors import BudgetError, UserError

if TYPE_CHECKING:
    import torch

    from dpo_video.estimation.modes import MemoryMode
    from dpo_video.estimation.results import Estimate, MemoryEstimate
    from dpo_video.estimation.tiers import Tier as Card
    from dpo_video.estimation.tracing import TraceCache
    from dpo_video.workflows.config import Config

DOES_NOT_FIT = 3  # exit code
# Listed in this order, the first of equally fast ones is recommended.
REFERENCES = ("toggle", "copy", "cached")


def estimate(
    backbone: Backbone = None,
    loss: Loss = None,
    reference: Reference = None,
    assignments: Assignments = None,
    file: File = None,
    tier: Tier = None,
    efficiency: Annotated[
        float,
        typer.Option(
            "--efficiency", min=0.01, max=1, help="Share of a card's operations that is reached."
        ),
    ] = 0.35,
    as_json: Json = False,
) -> None:
    """Predict memory and time of a run in every memory mode, before a weight is loaded.

    It needs no GPU and no weights: the training's own step runs on shapes. --tier names the card
    and takes its presets. Exit code 0 if the configured mode fits that card, or none is named; 3 if
    it does not; 2 if the command itself was wrong.
    """  # fmt: skip
    from dpo_video.estimation.tiers import find_tier

    config = resolve(
        file, assignments, backbone=backbone, loss=loss, reference=reference, tier=tier
    )
    card = find_tier(tier) if tier else None
    from dpo_video.estimation.tracing import TraceCache

    ran = TraceCache()
    if config.memory.checkpointing == "auto":
        _budget_of(config, None, tier)  # an error, if nobody says
        predict(config, traces=ran)  # what the choice and the table have in common
    try:
        config, fits = choose_blocks(config, tier=tier, traces=ran), True
    except BudgetError as error:  # the table shows what would fit
        console.print(f"[yellow]{escape(str(error))}[/]", highlight=False)
        fits = False
    found = predict(config, card=card, traces=ran).model_copy(update={"efficiency": efficiency})
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _show(config, found)
    if not fits or found.fits is False:
        raise typer.Exit(DOES_NOT_FIT)


def predict(
    config: Config,
    *,
    alone: bool = False,
    card: Card | None = None,
    traces: TraceCache | None = None,
) -> Estimate:
    """The forecast of a configuration: of all modes, or of its own alone.

    For a card also of the one that checkpoints the fewest blocks, if that is neither none nor all.
    What was rehearsed for the same configuration, its checkpointing aside, is spared.
    """
    import diffusers

    from dpo_video.estimation.estimate import estimate_memory
    from dpo_video.estimation.modes import candidate_modes
    from dpo_video.estimation.tracing import TraceCache

    diffusers.utils.logging.set_verbosity_error()  # remarks on configurations of older versions
    mine = config.tables["reference"]["name"]
    references: dict[str, Any] = {mine: config.reference}
    modes = [mode_of(config)]
    if not alone:
        others = {name: _reference(name) for name in REFERENCES}
        references = {**others, **references}
        shown = [
            mode.model_copy(update={"shard": config.memory.shard})
            for mode in candidate_modes(list(references), config.loss)
        ]
        modes = [*shown, *(mode for mode in modes if mode not in shown)]
    ran = traces or TraceCache()
    found = estimate_memory(
        config.backbone, references, config.loss, config.train, modes=modes, traces=ran
    )
    if card is not None and (need := _fewest(config, found, card, ran)):
        estimates = list(found.estimates)
        place = next(n for n, each in enumerate(estimates) if each.total < need.total)
        estimates.insert(place, need)
        found = found.model_copy(update={"estimates": tuple(estimates)})
    model = config.tables["backbone"].get("model", config.tables["backbone"]["name"])
    return found.model_copy(update={"model": model, "asked": mode_of(config), "tier": card})


def _fewest(config: Config, found: Estimate, card: Card, ran: TraceCache) -> MemoryEstimate | None:
    """What fits the card with the fewest blocks checkpointed, if that is neither none nor all.

    Of the first backward pass with which all of them would fit.
    """
    from dpo_video.estimation.fewest_blocks import BUDGET_SHARE, fewest_blocks
    from dpo_video.estimation.modes import BACKWARDS, MemoryMode

    name = REFERENCES[0]
    mine = config.reference if config.tables["reference"]["name"] == name else _reference(name)
    budget = BUDGET_SHARE * card.memory_gib * 2**30
    for backward in BACKWARDS:
        mode = MemoryMode(
            reference=name, checkpointing="blocks", backward=backward, shard=config.memory.shard
        )
        full = found.for_mode(mode)
        plain = found.for_mode(mode.model_copy(update={"checkpointing": "none"}))
        if full is None or full.total > budget:
            continue
        if plain is not None and plain.total <= budget:
            return None
        need = fewest_blocks(
            config.backbone, mine, config.loss, config.train, mode, budget, traces=ran
        ).estimate
        return need if found.for_mode(need.mode) is None else None
    return None


def choose_blocks(
    config: Config,
    *,
    tier: str | None = None,
    device: torch.device | None = None,
    traces: TraceCache | None = None,
) -> Config:
    """The configuration with a number in the place of checkpointing=auto; said in a line.

    Args:
        config: As it was asked for.
        tier: Whose card it is for, if the device does not say what it has.
        device: That it will run on, if that is known.
        traces: What was run for the same configuration, which spares it.

    Raises:
        UserError: if nobody says how much memory there is, or no number fits.
    """
    if config.memory.checkpointing != "auto":
        return config
    from dpo_video.estimation.fewest_blocks import fewest_blocks

    choice = fewest_blocks(
        config.backbone,
        config.reference,
        config.loss,
        config.train,
        mode_of(config),
        _budget_of(config, device, tier) * 2**30,
        traces=traces,
    )
    console.print(str(choice), highlight=False)
    _say_of_compiling(config, console)
    chosen = {"checkpointing": choice.estimate.mode.checkpointing}
    tables = {**config.tables, "memory": {**config.tables["memory"], **chosen}}
    return replace(config, memory=config.memory.model_copy(update=chosen), tables=tables)


def _budget_of(config: Config, device: torch.device | None, tier: str | None) -> float:
    """GiB that training may fill."""
    from dpo_video.estimation.fewest_blocks import BUDGET_SHARE

    return config.memory.budget or BUDGET_SHARE * _memory_of(device, tier)


def _say_of_compiling(config: Config, to: Console) -> None:
    if config.memory.compile == "on":
        to.print(
            "Predicted without memory.compile: what compiled blocks keep may be more or less.",
            highlight=False,
        )


def _memory_of(device: torch.device | None, tier: str | None) -> float:
    """GiB of the GPU that it will run on, or else of the card that is named."""
    import torch

    from dpo_video.estimation.tiers import find_tier

    if device is None and tier is None and torch.cuda.is_available():
        device = torch.device("cuda")
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    if tier is not None:
        return find_tier(tier).memory_gib
    where = f"on the device {device.type}" if device is not None else "without a GPU"
    raise UserError(
        f"memory.checkpointing=auto has no budget {where}. Set memory.budget=GIB, the memory that "
        "training may fill, or name a card with --tier."
    )


def mode_of(config: Config) -> MemoryMode:
    """The mode that a configuration asks for."""
    from dpo_video.estimation.modes import MemoryMode
    from dpo_video.training.step import check_backward

    check_backward(config.loss, config.memory)
    options = config.memory.model_dump(include=set(MemoryMode.model_fields))
    if options["checkpointing"] == "auto":  # not chosen yet
        options["checkpointing"] = "blocks"
    return MemoryMode(reference=config.tables["reference"]["name"], **options)


def _reference(name: str) -> Any:
    from dpo_video import registry

    return registry.load("reference", name)()


def warn_if_too_large(config: Config, device: torch.device) -> None:
    """Say before anything is loaded that a run will not fit the GPU it is for."""
    import torch

    if device.type != "cuda":
        return
    try:
        (need,) = predict(config, alone=True).estimates
    except UserError as error:
        console.print(f"[dim]What this run needs cannot be told beforehand: {error}[/]")
        return
    memory = torch.cuda.get_device_properties(device).total_memory
    said = f"needs {need.total / 2**30:.1f} of this GPU's {memory / 2**30:.1f} GiB (predicted)"
    if need.total <= memory:
        console.print(f"Training {said}.", highlight=False)
    else:
        console.print(
            f"[bold yellow]Training {said} and may run out of memory.[/] See what would fit: "
            "dpo-video estimate, with the same options.",
            highlight=False,
        )


def _show(config: Config, found: Estimate) -> None:
    out = Console()
    out.print(f"{found.headline}\n", highlight=False)
    out.print(found.table())
    out.print(f"\n[dim]{escape(found.legend)}[/]", highlight=False)
    _say_of_compiling(config, out)
    out.print(f"\n{escape(found.verdict)}", highlight=False)
