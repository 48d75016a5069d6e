"""Out of memory: the error that every user meets, and what to do about it."""

from __future__ import annotations

import re

import torch

from dpo_video.errors import UserError

# A CPU's allocator and Metal's have no class of error of their own.
_SAID = re.compile(r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED")
_WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")


def shortage(error: BaseException) -> UserError | None:
    """One sentence for an allocation that failed; None for any other error."""
    short = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _SAID.search(str(error))
    )
    if not short:
        return None
    wanted = _WANTED.search(str(error))
    return UserError(
        "Out of memory"
        + (f" (the last thing that was asked for: {wanted[1]})" if wanted else "")
        + ". What was saved before is safe. Training: dpo-video estimate, with the same "
        "options, shows "
        "which memory modes fit, and --set memory.checkpointing=auto chooses one. Anything else: "
        "lower evaluate.batch_size, or backbone.frames, height or width; --set "
        "memory.offload=blocks "
        "keeps the weights on the host."
    )
