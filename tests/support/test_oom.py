"""Whatever allocator says no, the user is told what to do."""

from __future__ import annotations

import pytest
import torch

from dpo_video.support.oom import shortage


def test_a_refused_allocation_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as met:
        torch.empty(2**50)
    said = str(shortage(met.value))
    assert "4503599627370496 bytes" in said and "memory.checkpointing=auto" in said
    assert shortage(RuntimeError("shapes cannot be multiplied")) is None
    assert shortage(ValueError("out of memory")) is None


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 ..."),
         "2.50 GiB"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GiB). Tried to allocate 3.1 GB"),
         "3.1 GB"),
        (MemoryError(), "Out of memory. Everything"),
    ],
)  # fmt: skip
def test_the_amount_is_told_where_it_is_known(error: BaseException, wanted: str) -> None:
    assert wanted in str(shortage(error))
