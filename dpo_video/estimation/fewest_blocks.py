"""How many blocks must be computed again for a step to fit a budget: the fewest that do.

Every count that is tried is run on shapes by `dpo_video.estimation.forecast`. The more blocks are
checkpointed, the less is held, so narrowing the counts that are left from both sides finds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from dpo_video.errors import BudgetError
from dpo_video.estimation.forecast import (
    CHUNKS,
    GIB,
    Checkpointing,
    Forecast,
    MemoryEstimate,
    MemoryMode,
    TraceCache,
    forecast,
)
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Backbone, Loss, Reference

_HALVED = 3  # each so many'th guess, so that a step in what is needed does not make for many
SHARE = 0.95  # of a card's memory, when nobody names a budget: others use it, and predictions err


@final
@dataclass(frozen=True, kw_only=True)
class Choice:
    """How many blocks, and what that needs."""

    need: MemoryEstimate
    """Its mode says how many: none, blocks (all of them) or a number."""
    blocks: int
    """That there are."""
    plain: MemoryEstimate
    """What it would be with none."""
    budget: float
    """Bytes."""

    def __str__(self) -> str:
        """What was chosen and why, in one sentence."""
        again = self.need.mode.checkpointing
        count = {"none": 0, "blocks": self.blocks}.get(str(again), again)
        said = f"{self.need.card / GIB:.1f} of {self.budget / GIB:.1f} GiB (predicted)"
        if count == 0:
            return f"Checkpointing none of {self.blocks} blocks: a step needs {said}."
        return (
            f"Checkpointing {count} of {self.blocks} blocks: a step needs {said}, "
            f"{self.plain.card / GIB:.1f} GiB with none; "
            f"{self.need.flops / self.plain.flops - 1:.0%} more operations."
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
) -> Choice:
    """The fewest checkpointed blocks with which a step fits.

    Args:
        backbone: The family, with the model and the size of its videos.
        reference: The one that `mode` names.
        loss: Of the run.
        settings: Rank, precision and batch shape the step.
        mode: Everything but its `checkpointing`, which is to be chosen.
        budget: Bytes of a card, its context and holes included.
        traces: What a forecast of the same configuration has run, which spares it.

    Raises:
        BudgetError: if it does not even fit with all, with what else would help.
    """
    before = traces or TraceCache()

    def tried(*modes: MemoryMode) -> Forecast:
        return forecast(
            backbone, {mode.reference: reference}, loss, settings, modes=modes, traces=before
        )

    def with_blocks(count: Checkpointing) -> MemoryMode:
        return mode.model_copy(update={"checkpointing": count})

    # What waits on the host is the inputs of those that are checkpointed: one at least.
    waiting = "checkpoints" in mode.offload
    elsewhere = tuple(each for each in mode.offload if each != "checkpoints")
    none = with_blocks("none").model_copy(update={"offload": elsewhere})
    ends = tried(none, with_blocks(1) if waiting else none, with_blocks("blocks"))
    plain, least, need = ends.needs
    choice = partial(Choice, blocks=ends.blocks, plain=plain, budget=budget)
    if least.card <= budget:
        return choice(need=least)
    if need.card > budget:
        raise BudgetError(
            f"memory.checkpointing=auto finds no number that fits: with all {ends.blocks} blocks "
            f"checkpointed, a step needs {need.card / GIB:.2f} GiB, and the budget is "
            f"{budget / GIB:.2f} (predicted). {_what_else(mode)}"
        )
    too_few, enough = int(waiting), ends.blocks
    guesses = 0
    while enough - too_few > 1:
        guesses += 1
        count = _guess(too_few, enough, least.card / budget, need.card / budget)
        if guesses % _HALVED == 0:
            count = (too_few + enough) // 2
        (here,) = tried(with_blocks(count)).needs
        if here.card <= budget:
            enough, need = count, here
        else:
            too_few, least = count, here
    return choice(need=need)


def _guess(too_few: int, enough: int, above: float, below: float) -> int:
    """The fewest between two numbers that may well fit.

    The blocks farthest out are checkpointed first and, in a UNet, hold the most: each takes about
    the same share off the peak.

    Args:
        too_few: A number of blocks that does not fit.
        enough: One that does.
        above: What is needed with `too_few`, over the budget.
        below: The same with `enough`.
    """
    share = math.log(above) / math.log(above / below)
    count = too_few + math.ceil((enough - too_few) * share)
    return min(max(count, too_few + 1), enough - 1)


def _what_else(mode: MemoryMode) -> str:
    """What would lower a peak that checkpointing alone does not."""
    ways: dict[str, Any] = {
        "memory.backward=split": mode.backward == "joint",
        f"memory.forward_chunks={CHUNKS}": mode.forward_chunks == 1,
        "memory.offload=checkpoints,optimizer,blocks": len(mode.offload) < 3,
        "memory.quantization=nf4 (it changes the numbers)": mode.quantization == "native",
    }
    left = [way for way, helps in ways.items() if helps]
    smaller = "lower backbone.frames, height or width"
    return f"Set {', '.join(left)}, or {smaller}." if left else f"{smaller.capitalize()}."
