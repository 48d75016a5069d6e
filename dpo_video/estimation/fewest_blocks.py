"""Choose the fewest checkpointed blocks with which a step fits a memory budget.

Every count tried is traced on shapes (`dpo_video.estimation.tracing`). Memory falls with the number
of checkpointed blocks, so narrowing the interval from both sides finds the count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from dpo_video.errors import BudgetError
from dpo_video.estimation.estimate import estimate_memory
from dpo_video.estimation.modes import CHUNKS, Checkpointing, MemoryMode
from dpo_video.estimation.results import GIB, Estimate, MemoryEstimate
from dpo_video.estimation.tracing import TraceCache
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Backbone, Loss, Reference

_BISECT_EVERY = 3  # guesses; bounds their number where memory falls in steps
BUDGET_SHARE = 0.95  # of a card's memory without memory.budget: others use it, predictions err


@final
@dataclass(frozen=True, kw_only=True)
class BlockChoice:
    """The chosen number of blocks and its estimate."""

    estimate: MemoryEstimate
    """Its mode holds the choice: none, blocks (all of them) or a number."""
    blocks: int
    """Number of blocks of the network."""
    plain: MemoryEstimate
    """The estimate without checkpointing."""
    budget: float
    """Bytes."""

    def __str__(self) -> str:
        """The choice and its reason in one sentence."""
        chosen = self.estimate.mode.checkpointing
        count = {"none": 0, "blocks": self.blocks}.get(str(chosen), chosen)
        need = f"{self.estimate.total / GIB:.1f} of {self.budget / GIB:.1f} GiB (predicted)"
        if count == 0:
            return f"Checkpointing none of {self.blocks} blocks: a step needs {need}."
        return (
            f"Checkpointing {count} of {self.blocks} blocks: a step needs {need}, "
            f"{self.plain.total / GIB:.1f} GiB with none; "
            f"{self.estimate.flops / self.plain.flops - 1:.0%} more operations."
        )


def fewest_blocks(
    backbone: Backbone,
    reference: Reference,
    loss: Loss,
    settings: TrainSettings,
    mode: MemoryMode,
    budget: float,
    *,
    traces: TraceCache | None = None,
) -> BlockChoice:
    """Find the fewest checkpointed blocks with which a step fits.

    Args:
        backbone: The model family, with the model and the size of its videos.
        reference: The reference that `mode` names.
        loss: The loss.
        settings: Rank, precision and batch size shape the step.
        mode: The mode; its `checkpointing` is replaced.
        budget: GPU memory in bytes, CUDA's context and fragmentation included.
        traces: Traces of the same configuration, which are reused.

    Raises:
        BudgetError: if a step does not fit even with all blocks; it names what else would help.
    """
    cache = traces or TraceCache()

    def estimate(*modes: MemoryMode) -> Estimate:
        return estimate_memory(
            backbone, {mode.reference: reference}, loss, settings, modes=modes, traces=cache
        )

    def with_blocks(count: Checkpointing) -> MemoryMode:
        return mode.model_copy(update={"checkpointing": count})

    # offload=checkpoints moves the inputs of checkpointed blocks, so there must be at least one.
    offloads = "checkpoints" in mode.offload
    others = tuple(each for each in mode.offload if each != "checkpoints")
    none = with_blocks("none").model_copy(update={"offload": others})
    ends = estimate(none, with_blocks(1) if offloads else none, with_blocks("blocks"))
    plain, least, most = ends.estimates
    choice = partial(BlockChoice, blocks=ends.blocks, plain=plain, budget=budget)
    if least.total <= budget:
        return choice(estimate=least)
    if most.total > budget:
        raise BudgetError(
            f"memory.checkpointing=auto finds no number that fits: with all {ends.blocks} blocks "
            f"checkpointed, a step needs {most.total / GIB:.2f} GiB, and the budget is "
            f"{budget / GIB:.2f} (predicted). {_what_else(mode)}"
        )
    too_few, enough = int(offloads), ends.blocks
    guesses = 0
    while enough - too_few > 1:
        guesses += 1
        count = _guess(too_few, enough, least.total / budget, most.total / budget)
        if guesses % _BISECT_EVERY == 0:
            count = (too_few + enough) // 2
        (tried,) = estimate(with_blocks(count)).estimates
        if tried.total <= budget:
            enough, most = count, tried
        else:
            too_few, least = count, tried
    return choice(estimate=most)


def _guess(too_few: int, enough: int, above: float, below: float) -> int:
    """The smallest count strictly between two counts that is likely to fit.

    The outermost blocks are checkpointed first and, in a UNet, hold the most: each lowers the peak
    by about the same factor.

    Args:
        too_few: A number of blocks that does not fit.
        enough: A number that does.
        above: Memory with `too_few`, as a multiple of the budget.
        below: Memory with `enough`, likewise.
    """
    fraction = math.log(above) / math.log(above / below)
    count = too_few + math.ceil((enough - too_few) * fraction)
    return min(max(count, too_few + 1), enough - 1)


def _what_else(mode: MemoryMode) -> str:
    """The options that would lower the peak further."""
    options: dict[str, Any] = {
        "memory.backward=split": mode.backward == "joint",
        f"memory.forward_chunks={CHUNKS}": mode.forward_chunks == 1,
        "memory.offload=checkpoints,optimizer,blocks": len(mode.offload) < 3,
        "memory.quantization=nf4 (it changes the numbers)": mode.quantization == "native",
    }
    left = [option for option, helps in options.items() if helps]
    smaller = "lower backbone.frames, height or width"
    more = f"{smaller}, or raise memory.budget where the card has more"
    return f"Set one or more of {', '.join(left)}; {more}." if left else f"{more.capitalize()}."
