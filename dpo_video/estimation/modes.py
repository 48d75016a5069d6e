"""Memory modes: the ways to run a training step that trade memory against time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, final

from dpo_video.settings import MemorySettings
from dpo_video.support.formatting import counted
from dpo_video.support.statistics import Record

if TYPE_CHECKING:
    from dpo_video.strategies import Loss

Checkpointing = Literal["none", "blocks"] | int
"""No block, all blocks, or that many blocks."""
Backward = Literal["joint", "split", "linear"]
Quantization = Literal["native", "int8", "nf4"]
CHECKPOINTINGS: tuple[Literal["none", "blocks"], ...] = ("none", "blocks")
BACKWARDS: tuple[Backward, ...] = ("joint", "linear", "split")
CHUNKS = 8  # forward_chunks of the smallest modes: with more, other tensors are the widest


@final
class MemoryMode(Record):
    """One way to run the step."""

    reference: str
    """Name of the reference."""
    checkpointing: Checkpointing
    backward: Backward
    forward_chunks: int = 1
    offload: tuple[str, ...] = ()
    quantization: Quantization = "native"
    shard: int = 1

    @property
    def memory(self) -> MemorySettings:
        """The [memory] options of this mode."""
        return MemorySettings.model_validate(self.model_dump(exclude={"reference"}))

    def __str__(self) -> str:
        """The mode in option names."""
        count = self.checkpointing
        parts = [self.reference, f"{counted(count, 'block')}" if isinstance(count, int) else count]
        parts += [self.backward]
        parts += [f"forward_chunks={self.forward_chunks}"] if self.forward_chunks > 1 else []
        parts += [f"offload={','.join(self.offload)}"] if self.offload else []
        parts += [f"shard={self.shard}"] if self.shard > 1 else []
        return " ".join(parts + ([self.quantization] if self.quantization != "native" else []))

    def brief(self) -> str:
        """The mode in at most 40 characters."""
        count = self.checkpointing
        blocks = f"{counted(count, 'block')}" if isinstance(count, int) else "blocks"
        parts = [self.reference, "" if count == "none" else blocks, self.backward]
        parts += [f"/{self.forward_chunks}" if self.forward_chunks > 1 else ""]
        parts += [f"cpu:{''.join(part[0] for part in self.offload)}" if self.offload else ""]
        parts += [f"x{self.shard}" if self.shard > 1 else ""]
        parts += [self.quantization if self.quantization != "native" else ""]
        return " ".join(part for part in parts if part)

    def flags(self, before: MemoryMode) -> str:
        """The command-line flags that ask for this mode, added to those that ask for `before`."""
        flags = []
        if self.reference != before.reference:
            flags.append(f"--reference {self.reference}")
        old = before.memory.model_dump()
        for name, value in self.memory.model_dump().items():
            if value != old[name]:
                text = ",".join(value) or "none" if isinstance(value, tuple) else value
                flags.append(f"--set memory.{name}={text}")
        return " ".join(flags)


def candidate_modes(references: Sequence[str], loss: Loss) -> list[MemoryMode]:
    """The modes worth comparing, from the largest to the smallest.

    The loss decides which backward pass holds the graph of one video at the least cost.
    """
    one_graph = "linear" if loss.linear_in_mean_error else "split"
    modes = [
        MemoryMode(reference=name, checkpointing="none", backward="joint") for name in references
    ]
    small: dict[str, Any] = {
        "checkpointing": "blocks", "backward": "split", "forward_chunks": CHUNKS,
    }  # fmt: skip
    offload = ("checkpoints", "optimizer")
    rows: list[dict[str, Any]] = [
        {"checkpointing": "none", "backward": one_graph},
        {"checkpointing": "blocks", "backward": "joint"},
        *(
            {"checkpointing": "blocks", "backward": each}
            for each in dict.fromkeys((one_graph, "split"))
        ),
        small,
        {**small, "offload": ("checkpoints",)},
        {**small, "offload": (*offload, "blocks")},
        {**small, "offload": offload, "quantization": "nf4"},
    ]
    return modes + [MemoryMode(reference=references[0], **row) for row in rows]
