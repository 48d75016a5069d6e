"""Deterministic kernels: identical runs give identical bits."""

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
    """Set PyTorch's determinism flags for this process, before its first GPU matrix product.

    All random draws of this package have their own generators (support/rng.py). The remaining
    differences between two runs on one machine come from the summation order of a kernel and from
    benchmarking kernels.

    Raises:
        UserError: if CUBLAS_WORKSPACE_CONFIG is set to a non-deterministic value.
    """
    if deterministic:
        found = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
        if found not in _WORKSPACES:
            raise UserError(
                f"run.deterministic needs {_WORKSPACE} to be {' or '.join(_WORKSPACES)}, and it is "
                f"set to '{found}'. Unset it, or omit --deterministic."
            )
        torch.backends.cudnn.benchmark = False  # it would choose kernels by timing
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)


def refusal(error: RuntimeError) -> UserError | None:
    """The UserError for an operation without a deterministic kernel; None for other errors.

    PyTorch raises a plain RuntimeError for it.
    """
    found = _NO_KERNEL.search(str(error))
    operation = found[1] if found else "cuBLAS" if _CUBLAS in str(error) else None
    if operation is None:
        return None
    return UserError(
        f"'{operation}' has no deterministic kernel on this device, and run.deterministic is on. "
        "Omit --deterministic (or --set run.deterministic=false to override a run.toml), choose "
        "another --device, or use a strategy that does not need this operation."
    )
