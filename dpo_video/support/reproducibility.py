"""Runs that are equal to the bit: kernels that always add in the same order, or none at all."""

from __future__ import annotations

import os
import re

import torch

from dpo_video.errors import UserError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# https://docs.nvidia.com/cuda/cublas/#results-reproducibility: either of these two
_WORKSPACES = (":4096:8", ":16:8")
_NO_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")
_CUBLAS = "it uses CuBLAS"


def settle(deterministic: bool) -> None:
    """Choose the kernels of this process; before its first matrix product on a GPU.

    Everything that this project draws has a generator of its own (seeds.py). What can still differ
    between two runs on one machine is the order in which a kernel adds, and which kernel a library
    takes for the fastest.

    Raises:
        UserError: if the environment asks cuBLAS for something else.
    """
    if deterministic:
        found = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
        if found not in _WORKSPACES:
            raise UserError(
                f"run.deterministic needs {_WORKSPACE} to be {' or '.join(_WORKSPACES)}, and the "
                f"environment says '{found}'. Unset it, or leave --deterministic out."
            )
        torch.backends.cudnn.benchmark = False  # it would take what is fastest this time
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)


def refusal(error: RuntimeError) -> UserError | None:
    """What torch says of an operation that it cannot repeat, as a sentence; None of other errors.

    Torch has no class for it.
    """
    found = _NO_KERNEL.search(str(error))
    operation = found[1] if found else "cuBLAS" if _CUBLAS in str(error) else None
    if operation is None:
        return None
    return UserError(
        f"'{operation}' cannot be repeated to the bit on this device, and run.deterministic asks "
        "for that. Leave --deterministic out (--set run.deterministic=false for a run that has it "
        "written down), run it on another --device, or use a strategy that does without that "
        "operation."
    )
