"""`dpo-video estimate`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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

    from dpo_video.estimation.forecast import Forecast, MemoryEstimate, MemoryMode, TraceCache
    from dpo_video.estimation.tiers import Tier as Card
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
    from dpo_video.estimation.tiers import find_tier, tiers

    config = resolve(
        file, assignments, backbone=backbone, loss=loss, reference=reference, tier=tier
    )
    card = find_tier(tier) if tier else None
    from dpo_video.estimation.forecast import TraceCache

    ran = TraceCache()
    if config.memory.checkpointing == "auto":
        _budget_of(config, None, tier)  # an error, if nobody says
        predict(config, traces=ran)  # what the choice and the table have in common
    try:
        config, fits = choose_blocks(config, tier=tier, traces=ran), True
    except BudgetError as error:  # the table shows what would fit
        console.print(f"[yellow]{escape(str(error))}[/]", highlight=False)
        fits = False
    found = predict(config, card=card, traces=ran)
    asked = found.of(mode_of(config))
    assert asked is not None
    best = found.best(card.memory_gib * 2**30) if card else None
    cards = list(tiers().values())
    if as_json:
        typer.echo(json.dumps(_report(found, asked, best, card, cards, efficiency), indent=2))
    else:
        _show(config, found, asked, best, card, cards, efficiency)
    if not fits or (card and not _holds(card, asked)):
        raise typer.Exit(DOES_NOT_FIT)


def predict(
    config: Config,
    *,
    alone: bool = False,
    card: Card | None = None,
    traces: TraceCache | None = None,
) -> Forecast:
    """The forecast of a configuration: of all modes, or of its own alone.

    For a card also of the one that checkpoints the fewest blocks, if that is neither none nor all.
    What was rehearsed for the same configuration, its checkpointing aside, is spared.
    """
    import diffusers

    from dpo_video.estimation.forecast import TraceCache, candidate_modes, forecast

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
    found = forecast(
        config.backbone, references, config.loss, config.train, modes=modes, traces=ran
    )
    if card is not None and (need := _fewest(config, found, card, ran)):
        needs = list(found.needs)
        needs.insert(next(n for n, each in enumerate(needs) if each.card < need.card), need)
        found = found.model_copy(update={"needs": tuple(needs)})
    return found


def _fewest(config: Config, found: Forecast, card: Card, ran: TraceCache) -> MemoryEstimate | None:
    """What fits the card with the fewest blocks checkpointed, if that is neither none nor all.

    Of the first backward pass with which all of them would fit.
    """
    from dpo_video.estimation.fewest_blocks import SHARE, fewest_blocks
    from dpo_video.estimation.forecast import BACKWARDS, MemoryMode

    name = REFERENCES[0]
    mine = config.reference if config.tables["reference"]["name"] == name else _reference(name)
    budget = SHARE * card.memory_gib * 2**30
    for backward in BACKWARDS:
        mode = MemoryMode(
            reference=name, checkpointing="blocks", backward=backward, shard=config.memory.shard
        )
        full, plain = found.of(mode), found.of(mode.model_copy(update={"checkpointing": "none"}))
        if full is None or full.card > budget:
            continue
        if plain is not None and plain.card <= budget:
            return None
        need = fewest_blocks(
            config.backbone, mine, config.loss, config.train, mode, budget, traces=ran
        ).need
        return need if found.of(need.mode) is None else None
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
    chosen = {"checkpointing": choice.need.mode.checkpointing}
    tables = {**config.tables, "memory": {**config.tables["memory"], **chosen}}
    return replace(config, memory=config.memory.model_copy(update=chosen), tables=tables)


def _budget_of(config: Config, device: torch.device | None, tier: str | None) -> float:
    """GiB that training may fill."""
    from dpo_video.estimation.fewest_blocks import SHARE

    return config.memory.budget or SHARE * _memory_of(device, tier)


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
    from dpo_video.estimation.forecast import MemoryMode
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
        (need,) = predict(config, alone=True).needs
    except UserError as error:
        console.print(f"[dim]What this run needs cannot be told beforehand: {error}[/]")
        return
    memory = torch.cuda.get_device_properties(device).total_memory
    said = f"needs {need.card / 2**30:.1f} of this GPU's {memory / 2**30:.1f} GiB (predicted)"
    if need.card <= memory:
        console.print(f"Training {said}.", highlight=False)
    else:
        console.print(
            f"[bold yellow]Training {said} and may run out of memory.[/] See what would fit: "
            "dpo-video estimate, with the same options.",
            highlight=False,
        )


def _holds(card: Card, need: MemoryEstimate) -> bool:
    return need.card <= card.memory_gib * 2**30


def _changes(need: MemoryEstimate, asked: MemoryEstimate) -> str:
    """The flags that ask for its mode, after those that asked for the other."""
    flags = []
    if need.mode.reference != asked.mode.reference:
        flags.append(f"--reference {need.mode.reference}")
    before, after = asked.mode.memory.model_dump(), need.mode.memory.model_dump()
    for name, value in after.items():
        if value != before[name]:
            said = ",".join(value) or "none" if isinstance(value, tuple) else value
            flags.append(f"--set memory.{name}={said}")
    return " ".join(flags)


def brief(mode: MemoryMode) -> str:
    """A mode in at most 40 characters."""
    again = f"{mode.checkpointing} blocks" if isinstance(mode.checkpointing, int) else "blocks"
    parts = [mode.reference, "" if mode.checkpointing == "none" else again]
    parts += [mode.backward, f"/{mode.forward_chunks}" if mode.forward_chunks > 1 else ""]
    parts += [f"host:{''.join(part[0] for part in mode.offload)}" if mode.offload else ""]
    parts += [f"x{mode.shard}" if mode.shard > 1 else ""]
    parts += [mode.quantization if mode.quantization != "native" else ""]
    return " ".join(part for part in parts if part)


def _report(
    found: Forecast,
    asked: MemoryEstimate,
    best: MemoryEstimate | None,
    card: Card | None,
    cards: list[Card],
    efficiency: float,
) -> dict[str, Any]:
    from dpo_video.estimation.forecast import CONTEXT, FRAGMENTS

    def row(need: MemoryEstimate) -> dict[str, Any]:
        return {
            **need.model_dump(),
            "tensors": need.tensors,
            "card": need.card,
            "fits": {each.name: _holds(each, need) for each in cards},
            "hours": {each.name: found.hours(need, each.tflops, efficiency) for each in cards},
        }

    return {
        **found.model_dump(exclude={"needs"}),
        "assumed": {"efficiency": efficiency, "context": CONTEXT, "fragments": FRAGMENTS},
        "tier": card.name if card else None,
        "asked": asked.mode.model_dump(),
        "fits": _holds(card, asked) if card else None,
        "recommended": best.mode.model_dump() if best else None,
        "needs": [row(need) for need in found.needs],
    }


def _show(
    config: Config,
    found: Forecast,
    asked: MemoryEstimate,
    best: MemoryEstimate | None,
    card: Card | None,
    cards: list[Card],
    efficiency: float,
) -> None:
    from dpo_video.estimation.forecast import CONTEXT, FRAGMENTS, GIB

    out = Console()
    tables = config.tables
    out.print(
        f"[bold]{tables['backbone'].get('model', tables['backbone']['name'])}[/]: "
        f"{found.parameters / 1e9:.2f} B parameters, {found.trainable / 1e6:.1f} M of them to "
        f"train (LoRA rank {config.train.rank}), latents "
        f"{' x '.join(map(str, found.latent_shape))}, precision {found.precision}, "
        f"{found.pairs} pairs in the run.\n[dim]Predicted on shapes: nothing was measured.[/]\n",
        highlight=False,
    )
    shown = card or cards[-1]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("mode", no_wrap=True)
    for column in ("GiB", "host", "TFLOP", f"h ({shown.name})"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("fits from", no_wrap=True)
    by_memory = sorted(cards, key=lambda each: each.memory_gib)
    for need in found.needs:
        smallest = next((each.name for each in by_memory if _holds(each, need)), "[red]none[/]")
        style = "" if card is None else "green" if _holds(card, need) else "red"
        gib = f"{need.card / GIB:.1f}"
        table.add_row(
            brief(need.mode),
            f"[{style}]{gib}[/]" if style else gib,
            f"{need.host / GIB:.1f}" if need.host else "",
            f"{need.flops / 1e12:,.0f}",
            f"{found.hours(need, shown.tflops, efficiency):,.1f}",
            smallest,
            style="bold" if need is asked else "",
        )
    out.print(table)
    out.print(
        "\n[dim]mode: reference, checkpointing, backward, /chunks, host:c(heckpoints) b(locks) "
        "o(ptimizer), xN processes that share the weights, base; int8 and nf4 change the "
        "numbers. GiB: weights, adapter (gradients and AdamW's state) and activations, "
        f"{FRAGMENTS:.0%} of these for holes, and {CONTEXT / GIB:.1f} GiB for CUDA itself. TFLOP: "
        f"of a pair. h: of the run's steps at {efficiency:.0%} of the card's published speed "
        "(assumed), transfers to and from the host and between cards not counted. cached: its "
        "predictions are made ahead, and its draws repeat.[/]",
        highlight=False,
    )
    _say_of_compiling(config, out)
    if card is None:
        out.print(
            "Name a card to be told what to choose: --tier " + "|".join(c.name for c in cards)
        )
        return
    fits = _holds(card, asked)
    adapter = asked.gradients + asked.optimizer
    out.print(
        f"\nThe mode asked for (bold) needs {asked.card / GIB:.1f} GiB (weights "
        f"{asked.weights / GIB:.1f}, adapter {adapter / GIB:.1f}, activations "
        f"{asked.activations / GIB:.1f}) and "
        + ("[green]fits[/]" if fits else "[bold red]does not fit[/]")
        + f" {card.card} ({card.memory_gib:g} GiB).",
        highlight=False,
    )
    if best is None:
        out.print(
            "No mode does. Lower backbone.frames, height or width, or train.rank; or take a "
            "smaller model."
        )
    elif best.mode != asked.mode and (not fits or best.flops < asked.flops):
        changes = (
            ", which changes the numbers"
            if best.mode.quantization != asked.mode.quantization
            else ""
        )
        out.print(f"Recommended{changes}: {_changes(best, asked)}", highlight=False)
