"""Shards: many pairs in one file, so that a set can be copied and streamed.

    shards.json                         the pairs and prompts of each shard
    shards/pairs-00000.safetensors      first, second, preference, region of many pairs
    shards/prompts-00000.safetensors    encoded prompts

A shard is a safetensors file whose tensors have an additional leading axis: row 3 of each belongs
to the fourth name in the index. Only the byte ranges of a row are read, so neither memory nor
traffic grows with the shard.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Annotated, Literal, final

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from dpo_video.data.storage import Storage

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
INDEX = "shards.json"
LONGEST = 1 << 16  # bytes of a header; a few tensors need far less

Held = Annotated[str, Field(pattern=r"^(latents/[0-9]{5,12}|contexts/[0-9a-f]{16})$")]
"""A pair or an encoded prompt: the name of its own file in an unpacked store, without suffix."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """A file and the names of its rows."""

    file: str = Field(pattern=r"^shards/[a-z]+-[0-9]{5,9}\.safetensors$")
    holds: tuple[Held, ...]


class ShardIndex(_Record):
    """shards.json."""

    format: Literal["dpo-video shards"] = "dpo-video shards"
    version: Literal[1] = 1
    shards: tuple[Shard, ...]


class _Tensor(_Record):
    """A tensor in a safetensors header."""

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


_HEADER = TypeAdapter(dict[str, _Tensor])


@dataclass(frozen=True)
class _Rows:
    """The byte layout of a tensor's rows in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of the first row, bytes."""
    size: int
    """Size of a row, bytes."""


@final
class Shards:
    """The shards of a store; reading is safe from several threads at once."""

    def __init__(self, storage: Storage, index: ShardIndex) -> None:
        self._storage = storage
        self._at = {
            name: (shard, row) for shard in index.shards for row, name in enumerate(shard.holds)
        }
        self._layouts: dict[str, list[_Rows]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def file(self, name: str) -> str:
        """The file of the shard that holds a name."""
        return self._at[name][0].file

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a pair or a prompt.

        Raises:
            OSError: if the shard is missing or damaged.
            ValueError: if the shard does not match the index.
        """
        shard, row = self._at[name]
        layout = self._layouts.get(shard.file)
        if layout is None:  # two threads may both compute it, with the same result
            layout = _layout(self._storage, shard.file, len(shard.holds))
            self._layouts[shard.file] = layout
        starts = [each.start + row * each.size for each in layout]
        spans = [(start, start + each.size) for start, each in zip(starts, layout, strict=True)]
        return {
            each.name: torch.frombuffer(part, dtype=each.dtype).view(each.shape)
            for each, part in zip(layout, self._storage.parts(shard.file, spans), strict=True)
        }


def _layout(storage: Storage, file: str, rows: int) -> list[_Rows]:
    """The byte layout of all tensors of a shard with this number of rows."""
    (length,) = struct.unpack("<Q", storage.parts(file, [(0, 8)])[0])
    if length > LONGEST:
        raise ValueError("its header is too long")
    found = []
    for name, tensor in _parse_header(storage.parts(file, [(8, 8 + length)])[0]).items():
        if tensor.shape[:1] != (rows,):
            raise ValueError(f"'{name}' does not have the {rows} rows that {INDEX} lists")
        dtype = DTYPES[tensor.dtype]
        shape = tensor.shape[1:]
        size = math.prod(shape) * dtype.itemsize
        start, stop = tensor.data_offsets
        if stop - start != size * rows or not size:
            raise ValueError(f"'{name}' has another size than its header says")
        found.append(_Rows(name, dtype, shape, 8 + length + start, size))
    return found


def _parse_header(text: bytes | bytearray) -> dict[str, _Tensor]:
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("its header is not a table")
        found.pop("__metadata__", None)
        return _HEADER.validate_python(found)
    except (ValidationError, RecursionError) as error:
        raise ValueError("its header is damaged") from error
