"""Nested dicts, lists, numbers, strings and tensors in one safetensors file, without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dpo_video.support.atomic import write_tensors
from dpo_video.support.reading import require_regular

_TENSOR, _PAIRS = "__tensor__", "__pairs__"


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists, numbers, strings and tensors to one safetensors file, atomically.

    Raises:
        TypeError: for any other type.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_pack(state, tensors))
    write_tensors(path, tensors, metadata={"state": skeleton})


def load_state(path: Path) -> Any:
    """Read a file of `save_state`, with tensors on the CPU.

    Raises:
        ValueError: if the file does not hold such a state.
        OSError, SafetensorError: if the file cannot be read.
    """
    require_regular(path)
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("state")
    if text is None:
        raise ValueError("it has no state metadata")
    tensors = load_file(path)
    try:
        return _unpack(json.loads(text), tensors)
    except (TypeError, LookupError, ValueError, RecursionError) as error:
        raise ValueError(f"its state cannot be read: {error}") from error


def _pack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        name = str(len(tensors))
        tensors[name] = node.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(node, dict):
        # JSON keys are strings; optimizer states are keyed by integers.
        return {_PAIRS: [[key, _pack(value, tensors)] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        return [_pack(value, tensors) for value in node]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"a state cannot hold a {type(node).__name__}")


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(value, tensors) for value in node]
    if isinstance(node, dict):
        if _TENSOR in node:
            return tensors[node[_TENSOR]]
        return {key: _unpack(value, tensors) for key, value in node[_PAIRS]}
    return node
