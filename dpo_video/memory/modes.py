"""Let a network run as the memory modes ask for."""

from __future__ import annotations

from torch import nn

from dpo_video.errors import TrainingError
from dpo_video.memory.blocks import attend_by_kernel, checkpoint_blocks, run_in_chunks
from dpo_video.memory.compile import compile_blocks
from dpo_video.settings import MemorySettings


def apply_memory_modes(network: nn.Module, memory: MemorySettings) -> None:
    """Let a network run as the modes ask for, its attention always by a kernel.

    Called again, it replaces what it did before.

    Raises:
        TrainingError: if the network has no parts of the kind that a mode is about, or nobody has
            chosen yet how many.
    """
    attend_by_kernel(network)
    if memory.forward_chunks > 1 or _has(network, "_chunks"):
        run_in_chunks(network, memory.forward_chunks)
    if memory.checkpointing == "auto":
        raise TrainingError(
            "memory.checkpointing=auto is chosen before training: by `dpo-video train`, or by "
            "dpo_video.estimation.fewest_blocks.fewest_blocks. Set the number of blocks."
        )
    if memory.compile == "on" or _has(network, "_plain"):
        compile_blocks(network, memory.compile == "on")
    asked = memory.checkpointing
    if asked != "none" or _has(network, "_computed"):
        count = asked if isinstance(asked, int) else {"none": 0, "blocks": None}[asked]
        checkpoint_blocks(network, count, inputs_on_host="checkpoints" in memory.offload)


def _has(network: nn.Module, mark: str) -> bool:
    return any(mark in vars(module) for module in network.modules())
