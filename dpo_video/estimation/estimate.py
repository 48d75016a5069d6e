"""Predict the memory and the operations of a training step from a model's configuration.

The step is traced on shapes (`dpo_video.estimation.tracing`). A transformer of many equal layers is
traced with a few of them, since every figure is linear in their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_video.estimation.modes import (
    BACKWARDS,
    CHECKPOINTINGS,
    Backward,
    Checkpointing,
    MemoryMode,
)
from dpo_video.estimation.results import Estimate, MemoryEstimate
from dpo_video.estimation.tracing import TraceCache, WeightStorage, storage_of
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Backbone, Loss, Reference

# Each layer from the second on adds the same to every figure, so two depths give the slope. (For
# Wan 14B, 3 and 5 layers predict the same in every mode of `candidate_modes`.) Checkpointed layers
# and plain layers have a slope each, which one more layer gives.
LAYERS = (2, 3)


def estimate_memory(
    backbone: Backbone,
    references: Mapping[str, Reference],
    loss: Loss,
    settings: TrainSettings,
    *,
    checkpointings: Sequence[Checkpointing] = CHECKPOINTINGS,
    backwards: Sequence[Backward] = BACKWARDS,
    modes: Sequence[MemoryMode] | None = None,
    traces: TraceCache | None = None,
) -> Estimate:
    """Trace the training step on shapes in every mode asked for.

    Args:
        backbone: The model family, with the model and the size of its videos.
        references: The references by name, as in `MemoryMode.reference`.
        loss: The loss. Modes that it cannot be trained in are left out.
        settings: Rank, precision and batch size shape the step.
        checkpointings: Without `modes`: predicted with every reference and backward pass.
        backwards: Without `modes`: the backward passes to predict.
        modes: The modes to predict.
        traces: The traces of earlier calls for the same configuration; they are reused, and new
            ones are added.

    Raises:
        UserError: if the model's configuration cannot be read or the backbone cannot describe the
            shapes of its prompts.
    """
    cache = TraceCache() if traces is None else traces
    outline = cache.outline(backbone, settings)
    layers = outline.layers
    asked = modes or [
        MemoryMode(reference=name, checkpointing=checkpointing, backward=backward)
        for checkpointing in checkpointings
        for backward in sorted(backwards, key=BACKWARDS.index)
        for name in references
    ]
    asked = [mode for mode in asked if mode.backward != "linear" or loss.linear_in_mean_error]
    plans = [_plan(mode, layers) for mode in asked]
    missing: dict[tuple[int | None, WeightStorage], list[MemoryMode]] = {}
    for depth, mode in dict.fromkeys((term.layers, term.mode) for plan in plans for term in plan):
        if (depth, mode) not in cache.estimates:
            missing.setdefault((depth, storage_of(mode)), []).append(mode)
    for (depth, storage), untraced in missing.items():
        needed = {mode.reference: references[mode.reference] for mode in untraced}
        stage = cache.stage(backbone, needed, settings, depth, storage)
        found = stage.trace_step(untraced, loss, settings)
        cache.estimates.update({(depth, mode): each for mode, each in found.items()})
    return Estimate(
        model=str(getattr(backbone, "model", None) or type(backbone).__name__.lower()),
        parameters=outline.parameters,
        trainable=cache.trainable(layers),
        rank=settings.rank,
        efficiency=backbone.efficiency,
        latent_shape=outline.latent_shape,
        blocks=outline.blocks,
        precision=settings.mixed_precision,
        pairs=settings.steps * settings.gradient_accumulation_steps * settings.batch_size,
        estimates=tuple(
            _sum(mode, plan, cache.estimates) for mode, plan in zip(asked, plans, strict=True)
        ),
    )


@dataclass(frozen=True)
class _Term:
    """The estimate of a model of so many layers in a mode, multiplied by `times`."""

    layers: int | None
    mode: MemoryMode
    times: int


def _plan(mode: MemoryMode, layers: int | None) -> list[_Term]:
    """Express a model of many equal layers as a sum of models of few layers.

    Every figure grows by the same amount with each checkpointed layer, and by another amount with
    each plain one: at the peak, the backward pass of the last checkpointed layer, all layers of
    both kinds before it are held. The peak lies elsewhere only if one end is not checkpointed.
    """
    count = mode.checkpointing
    if layers is None:
        return [_Term(None, mode, 1)]
    few, more = LAYERS

    def slope(
        shorter: tuple[int, MemoryMode], longer: tuple[int, MemoryMode], times: int
    ) -> list[_Term]:
        return [_Term(*shorter, -times), _Term(*longer, times)]

    def with_blocks(count: int) -> MemoryMode:
        return mode.model_copy(update={"checkpointing": count})

    if not isinstance(count, int) or count >= layers:
        full = mode if not isinstance(count, int) else with_blocks(more)
        return [_Term(more, full, 1), *slope((few, full), (more, full), layers - more)]
    plain = layers - count
    if count == 1:
        start = few, with_blocks(1)
        return [_Term(*start, 1), *slope(start, (more, with_blocks(1)), plain - 1)]
    start = more, with_blocks(2)
    return [
        _Term(*start, 1),
        *slope(start, (more + 1, with_blocks(2)), plain - 1),
        *slope(start, (more + 1, with_blocks(3)), count - 2),
    ]


def _sum(
    mode: MemoryMode,
    plan: Sequence[_Term],
    found: Mapping[tuple[int | None, MemoryMode], MemoryEstimate],
) -> MemoryEstimate:
    first = found[plan[0].layers, plan[0].mode]
    update: dict[str, Any] = {"mode": mode}
    for figure in ("weights", "gradients", "optimizer", "activations", "flops", "host"):
        update[figure] = sum(
            term.times * getattr(found[term.layers, term.mode], figure) for term in plan
        )
    return first.model_copy(update=update)
