"""Which networks FSDP2 can shard; tests/training/test_processes.py trains them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from torch import nn

from dpo_video.diffusion.experts import Experts
from dpo_video.errors import TrainingError
from dpo_video.memory.fsdp import check_shardable, sharded_bytes
from dpo_video.settings import MemorySettings


def block(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)).requires_grad_(False)


def network(*widths: int) -> nn.Module:
    made = nn.Module()
    made.blocks = nn.ModuleList(map(block, widths))
    made.between = nn.Linear(3, 5, bias=False).requires_grad_(False)
    return made


def test_a_network_of_two_experts_is_refused() -> None:
    experts = Experts(network(2, 2), network(2, 2), boundary=500, park=False)
    with pytest.raises(TrainingError, match=r"two experts.*Set memory.shard=1"):
        check_shardable(experts)


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(TrainingError, match="A Linear has no blocks"):
        check_shardable(nn.Linear(2, 2))
    check_shardable(network(2))


def test_quantized_weights_are_refused() -> None:
    with pytest.raises(ValidationError, match="set quantization=native, or shard=1"):
        MemorySettings(shard=2, quantization="nf4")


def test_the_last_part_is_padded_and_the_largest_block_is_gathered_twice() -> None:
    weights = {width: 4 * 2 * (width * width + width) for width in (4, 6)}
    found = sharded_bytes(network(4, 6), 4)
    assert found.whole == sum(weights.values()) + 4 * 15
    rows = {4: 1, 6: 2}  # of 4 and 6 rows, a quarter rounded up
    of_blocks = sum(4 * 2 * (rows[width] * width + rows[width]) for width in (4, 6))
    assert (found.parts_of_blocks, found.parts) == (of_blocks, of_blocks + 4 * 2 * 3)
    assert found.gathered == 4 * 15 + 2 * weights[6]
