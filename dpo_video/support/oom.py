"""Out-of-memory errors as one sentence with a next step."""

from __future__ import annotations

import re

import torch

from dpo_video.errors import UserError

# The CPU's and Metal's allocators raise no exception class of their own.
_MESSAGE = re.compile(r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED")
_SIZE = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")


def shortage(error: BaseException) -> UserError | None:
    """The UserError for a failed allocation; None for any other error."""
    short = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _MESSAGE.search(str(error))
    )
    if not short:
        return None
    size = _SIZE.search(str(error))
    return UserError(
        "Out of memory"
        + (f" (tried to allocate {size[1]})" if size else "")
        + ". Everything saved before is intact. For training, `dpo-video estimate` with the same "
        "options shows which memory modes fit, and --set memory.checkpointing=auto chooses one. "
        "Otherwise lower evaluate.batch_size or backbone.frames, height or width, or keep the "
        "weights in CPU memory with --set memory.offload=blocks."
    )
