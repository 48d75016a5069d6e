"""Apply memory modes to a network, in one order.

At load (`Placement.pack`): frozen weights are quantized or offloaded (`packed_weights`). Before
training (`apply_memory_modes`): attention kernels are set, and `forward` is wrapped. Around a
block, from the outside in: checkpointing (which may offload the block's inputs), compilation;
inside it, around a layer: chunks, then the unpacking of its weight. Setting a mode again replaces
it (dpo_video/memory/hooks.py). Last, frozen weights are sharded (`fsdp`), whose hooks are around
all of these. What the network computes stays the same, except that weights in fewer bits are other
weights, and that chunks and compiled kernels round differently.
"""

from __future__ import annotations

from torch import nn

from dpo_video.errors import TrainingError
from dpo_video.memory.blocks import attend_by_kernel, checkpoint_blocks, run_in_chunks
from dpo_video.memory.compile import compile_blocks
from dpo_video.memory.hooks import is_wrapped
from dpo_video.settings import MemorySettings


def apply_memory_modes(network: nn.Module, memory: MemorySettings) -> None:
    """Run a network in the given memory modes, and its attention by a kernel in any case.

    Another call replaces the effect of an earlier one. Packed weights stay as they are.

    Raises:
        TrainingError: if the network has no layers that a mode applies to, or the number of
            checkpointed blocks is not chosen yet.
    """
    if memory.checkpointing == "auto":
        raise TrainingError(
            "memory.checkpointing=auto is chosen before training: by `dpo-video train`, or by "
            "dpo_video.estimation.fewest_blocks.fewest_blocks. Set the number of blocks."
        )
    attend_by_kernel(network)
    if memory.forward_chunks > 1 or is_wrapped(network, "chunk"):
        run_in_chunks(network, memory.forward_chunks)
    if memory.compile == "on" or is_wrapped(network, "compile"):
        compile_blocks(network, memory.compile == "on")
    asked = memory.checkpointing
    if asked != "none" or is_wrapped(network, "checkpoint"):
        count = asked if isinstance(asked, int) else {"none": 0, "blocks": None}[asked]
        checkpoint_blocks(network, count, inputs_on_host="checkpoints" in memory.offload)
