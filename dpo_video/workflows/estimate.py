"""Predict memory and time of a run, and choose how many blocks to checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import diffusers
import torch

from dpo_video import registry
from dpo_video.data.build import wanted
from dpo_video.data.store import PairStore
from dpo_video.errors import BudgetError, UserError
from dpo_video.estimation import modes as memory_modes
from dpo_video.estimation.estimate import estimate_memory
from dpo_video.estimation.fewest_blocks import BUDGET_SHARE, fewest_blocks
from dpo_video.estimation.modes import BACKWARDS, MemoryMode
from dpo_video.estimation.phases import Plan, predict_phases
from dpo_video.estimation.results import (
    GIB,
    NOT_COMPILED,
    Estimate,
    MemoryEstimate,
    PhaseEstimate,
)
from dpo_video.estimation.tiers import Tier, find_tier
from dpo_video.estimation.tracing import TraceCache
from dpo_video.memory.compile import check_compile_modes
from dpo_video.strategies import PairBuilder
from dpo_video.training.lora import check_lora, starting_rank
from dpo_video.training.step import check_backward
from dpo_video.types import Placement
from dpo_video.workflows.config import Config
from dpo_video.workflows.options import TrainOptions, checked, configure, with_options
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.session import evaluation_prompts

# Of equally fast modes, that of the first reference in this order is recommended.
_ANNOUNCED = (
    "Running training steps on shapes to predict the memory, which takes seconds for small models "
    "and minutes for large ones."
)
REFERENCES = ("toggle", "copy", "cached")


@with_options
@checked
def estimate(
    pairs: PairBuilder | PairStore | Path | str | None = None,
    *,
    efficiency: float | None = None,
    progress: Progress = SILENT,
    **options: Unpack[TrainOptions],
) -> Estimate:
    """Predict memory and time of a run in every memory mode, before a weight is loaded.

    It needs no GPU and no weights: the training's own step runs on shapes.

    Args:
        pairs: Finished pairs, whose backbone, options and precision are taken, or a pair builder.
        efficiency: Assumed share of a card's published speed, in (0, 1]; by default the
            backbone's.
        progress: Receives the progress.
        options: See `TrainOptions`; `tier` names the card.

    Raises:
        UserError: for a wrong option, or a model whose configuration cannot be read.
    """
    tier = options.get("tier")
    config = configure("train", options, pairs)
    check_compile_modes(config.memory)
    for note in config.notes:
        progress.note(note)
    if config.loss.sees_groups:
        progress.note(
            "The step is predicted for pairs. On groups of n samples joint backward passes hold n "
            "/ 2 times the activations; memory.backward=split and linear hold those of one video "
            "and need n / 2 times the time.",
            warning=True,
        )
    card = find_tier(tier) if tier else None
    config = with_starting_rank(config)
    traces = TraceCache()
    progress.note(_ANNOUNCED)
    if config.memory.checkpointing == "auto":
        _budget_of(config, None, tier)  # refuses at once if no budget is known
        predict(config, traces=traces)  # what the choice and the table have in common
    try:
        config, within_budget = (
            choose_blocks(config, tier=tier, traces=traces, progress=progress),
            True,
        )
    except BudgetError as error:  # the table shows what would fit
        progress.note(str(error), warning=True)
        within_budget = False
    found = predict(config, card=card, traces=traces)
    phases, plan = phases_of(config, found, traces), plan_of(config)
    found = found.model_copy(
        update={"phases": phases, "work": str(plan), "remedies": _remedies(config)}
    )
    compiled = config.memory.compile == "on"
    update: dict[str, Any] = {"within_budget": within_budget, "compiled": compiled}
    if efficiency is not None:
        update["efficiency"] = efficiency
    return found.model_copy(update=update)


def phases_of(config: Config, found: Estimate, traces: TraceCache) -> tuple[PhaseEstimate, ...]:
    """Predict what a configuration needs besides the training steps.

    Args:
        config: The configuration.
        found: Its estimate.
        traces: The traces of that estimate.
    """
    assert found.asked is not None
    step = found.for_mode(found.asked)
    assert step is not None
    return predict_phases(
        config.backbone, config.train, found.asked, step, plan_of(config),
        text_encoder_on_host=config.memory.text_encoder == "host", traces=traces,
    )  # fmt: skip


def plan_of(config: Config) -> Plan:
    """How many videos a configuration draws, and how."""
    train, settings = config.train, config.evaluate
    checkpoints = -(-train.steps // train.save_steps)
    return Plan(
        pairs=0 if config.pairs is None else wanted(config.build, None),
        samples_per_pair=getattr(config.pairs, "samples", 1),
        encodes=config.pairs is not None and config.pairs.needs_video,
        pair_steps=getattr(config.pairs, "num_inference_steps", None),
        validation_videos=train.validation_videos * checkpoints,
        videos=len(evaluation_prompts(config)),
        batch_size=settings.batch_size,
        evaluation_steps=settings.num_inference_steps,
    )


def _remedies(config: Config) -> tuple[tuple[str, str], ...]:
    """What a configuration does not do yet against parts that do not fit beside the steps."""
    found = []
    if config.memory.text_encoder != "host":
        advice = "Keep the text encoder in CPU memory: --set memory.text_encoder=host."
        found.append(("text encoder", advice))
    if getattr(config.backbone, "tiling", True) is False:
        advice = "Use the VAE in tiles: --set backbone.tiling=true."
        found += [(": encode", advice), (": decode", advice)]
    if "blocks" not in config.memory.offload:
        modes = ",".join([*config.memory.offload, "blocks"])
        found.append(("sample", f"Keep idle blocks in CPU memory: --set memory.offload={modes}."))
    if config.evaluate.batch_size > 1:
        found.append(("evaluate: sample", "Lower evaluate.batch_size."))
    return tuple(found)


def predict(
    config: Config,
    *,
    alone: bool = False,
    card: Tier | None = None,
    traces: TraceCache | None = None,
) -> Estimate:
    """Predict what a configuration needs, in all memory modes or in its own `alone`.

    With a card, the mode is added that fits it with the fewest checkpointed blocks, unless that is
    none or all of them. `traces` holds steps that were traced before.
    """
    diffusers.utils.logging.set_verbosity_error()  # remarks on configurations of older versions
    own = config.tables["reference"]["name"]
    references: dict[str, Any] = {own: config.reference}
    modes, shard = [mode_of(config)], config.memory.shard
    if not alone:
        if config.loss.needs_reference:
            references = {**{name: _reference(name) for name in REFERENCES}, **references}
        shown = [
            mode if mode.quantization != "native" else mode.model_copy(update={"shard": shard})
            for mode in memory_modes.candidate_modes(list(references), config.loss)
        ]
        modes = [*shown, *(mode for mode in modes if mode not in shown)]
    cache = traces or TraceCache()
    found = estimate_memory(
        config.backbone, references, config.loss, config.train, modes=modes, traces=cache
    )
    if card is not None and (fewest := _fewest(config, found, card, cache)):
        estimates = list(found.estimates)
        position = next(n for n, each in enumerate(estimates) if each.total < fewest.total)
        estimates.insert(position, fewest)
        found = found.model_copy(update={"estimates": tuple(estimates)})
    model = config.tables["backbone"].get("model", config.tables["backbone"]["name"])
    return found.model_copy(update={"model": model, "asked": mode_of(config), "tier": card})


def _fewest(
    config: Config, found: Estimate, card: Tier, traces: TraceCache
) -> MemoryEstimate | None:
    """The mode that fits a card with the fewest blocks checkpointed, if neither none nor all.

    It takes the first backward pass with which all blocks would fit.
    """
    asked = config.tables["reference"]["name"]
    name = REFERENCES[0] if config.loss.needs_reference else asked
    own = config.reference if asked == name else _reference(name)
    budget = BUDGET_SHARE * card.memory_gib * GIB
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
        estimate = fewest_blocks(
            config.backbone, own, config.loss, config.train, mode, budget, traces=traces
        ).estimate
        return estimate if found.for_mode(estimate.mode) is None else None
    return None


def with_starting_rank(config: Config) -> Config:
    """The configuration with the rank of the LoRA that `train.init_from` names, if it does."""
    if config.train.init_from is None:
        return config
    model = config.backbone.load(Placement(on_meta=True))
    return replace(config, train=starting_rank(config.train, model))


def choose_blocks(
    config: Config,
    *,
    tier: str | None = None,
    device: torch.device | None = None,
    traces: TraceCache | None = None,
    progress: Progress = SILENT,
) -> Config:
    """Replace checkpointing=auto with a number of blocks, and report the choice.

    The budget is memory.budget, else a share of the memory of the device, else of the tier's card.

    Raises:
        UserError: if the memory is unknown.
        BudgetError: if no number of blocks fits.
    """
    if config.memory.checkpointing != "auto":
        return config
    if traces is None:
        progress.note(_ANNOUNCED)
    choice = fewest_blocks(
        config.backbone,
        config.reference,
        config.loss,
        config.train,
        mode_of(config),
        _budget_of(config, device, tier) * GIB,
        traces=traces,
    )
    progress.note(str(choice))
    if config.memory.compile == "on":
        progress.note(NOT_COMPILED)
    chosen = {"checkpointing": choice.estimate.mode.checkpointing}
    tables = {**config.tables, "memory": {**config.tables["memory"], **chosen}}
    return replace(config, memory=config.memory.model_copy(update=chosen), tables=tables)


def _budget_of(config: Config, device: torch.device | None, tier: str | None) -> float:
    """GiB that training may fill."""
    return config.memory.budget or BUDGET_SHARE * _memory_of(device, tier)


def _memory_of(device: torch.device | None, tier: str | None) -> float:
    """GiB of the GPU of the run, or else of the tier's card."""
    if device is None and tier is None and torch.cuda.is_available():
        device = torch.device("cuda")
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    if tier is not None:
        return find_tier(tier).memory_gib
    where = f"on the device {device.type}" if device is not None else "without a GPU"
    raise UserError(
        f"memory.checkpointing=auto has no budget {where}. Set memory.budget=GIB, the memory that "
        "training may fill, or name a card with --tier."
    )


def mode_of(config: Config) -> MemoryMode:
    """The memory mode of a configuration; "blocks" in place of checkpointing=auto."""
    check_backward(config.loss, config.memory)
    check_lora(config.train, config.memory)
    options = config.memory.model_dump(include=set(MemoryMode.model_fields))
    if options["checkpointing"] == "auto":
        options["checkpointing"] = "blocks"
    return MemoryMode(reference=config.tables["reference"]["name"], **options)


def _reference(name: str) -> Any:
    return registry.load("reference", name)()


def warn_if_too_large(config: Config, device: torch.device, progress: Progress) -> None:
    """Report before anything is loaded what a run needs, and whether it fits its GPU."""
    if device.type != "cuda":
        return
    try:
        (estimate,) = predict(config, alone=True).estimates
    except UserError as error:
        progress.note(f"The memory of this run cannot be predicted: {error}")
        return
    memory = torch.cuda.get_device_properties(device).total_memory
    needs = f"needs {estimate.total / GIB:.1f} of this GPU's {memory / GIB:.1f} GiB (predicted)"
    if estimate.total <= memory:
        progress.note(f"Training {needs}.")
    else:
        progress.note(
            f"Training {needs} and may run out of memory. See what would fit: dpo-video estimate, "
            "with the same options.",
            warning=True,
        )
