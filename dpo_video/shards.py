"""Many pairs in one file, so that a set can be copied and streamed.

    shards.json                         which shard has which pair or prompt
    shards/pairs-00000.safetensors      first, second, preference, region, of many pairs
    shards/prompts-00000.safetensors    encoded prompts

A shard is an ordinary safetensors file whose tensors have one axis more, in front: row 3 of each
belongs to the fourth name that the shard holds. A row is read by its ranges of bytes alone, so that
neither memory nor traffic grows with the shard.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, final

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from safetensors.torch import load
from torch import Tensor

from dpo_video.places import Place

INDEX = "shards.json"
LONGEST = 1 << 16  # bytes of a header that names a few tensors

Held = Annotated[str, Field(pattern=r"^(latents/[0-9]{5,12}|contexts/[0-9a-f]{16})$")]
"""A pair or an encoded prompt, as its own file would be called without its ending."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """A file, and what its rows are."""

    file: str = Field(pattern=r"^shards/[a-z]+-[0-9]{5,9}\.safetensors$")
    holds: tuple[Held, ...]


class ShardIndex(_Record):
    """shards.json."""

    format: Literal["dpo-video shards"] = "dpo-video shards"
    version: Literal[1] = 1
    shards: tuple[Shard, ...]


class _Tensor(_Record):
    """A tensor in a header, as the format describes it."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


_HEADER = TypeAdapter(dict[str, _Tensor])


@dataclass(frozen=True)
class _Layout:
    """Where the bytes of some tensors, or of a row of each, are in a file."""

    head: bytes
    """What makes a safetensors file of them when their bytes follow."""
    spans: Sequence[tuple[int, int]]
    """Per tensor, the first row's first byte and a row's number of bytes."""

    def read(self, place: Place, file: str, row: int = 0) -> dict[str, Tensor]:
        spans = [(start + row * each, start + (row + 1) * each) for start, each in self.spans]
        return load(b"".join([self.head, *place.parts(file, spans)]))


@final
class Shards:
    """The shards of a store, open for reading from any number of threads."""

    def __init__(self, place: Place, index: ShardIndex) -> None:
        self._place = place
        self._at = {
            name: (shard, row) for shard in index.shards for row, name in enumerate(shard.holds)
        }
        self._layouts: dict[tuple[str, tuple[str, ...]], _Layout] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def file(self, name: str) -> str:
        """The shard that holds it."""
        return self._at[name][0].file

    def read(self, name: str, only: Sequence[str] = ()) -> dict[str, Tensor]:
        """The tensors of a pair or a prompt, all or some.

        Raises:
            OSError: if the shard is missing or damaged.
            ValueError: if it is not what the index says.
            SafetensorError: if the tensors are none.
        """
        shard, row = self._at[name]
        layout = self._layouts.get((shard.file, tuple(only)))
        if layout is None:  # twice from two threads does no harm
            layout = _layout(self._place, shard.file, only, len(shard.holds))
            self._layouts[shard.file, tuple(only)] = layout
        return layout.read(self._place, shard.file, row)


def read_some(place: Place, file: str, only: Sequence[str]) -> dict[str, Tensor]:
    """Some tensors of a safetensors file, without reading the others; errors as `Shards.read`."""
    return _layout(place, file, only).read(place, file)


def _layout(place: Place, file: str, only: Sequence[str], rows: int | None = None) -> _Layout:
    """Of the tensors of these names, or of all; whole ones where no number of rows is given."""
    (length,) = struct.unpack("<Q", place.parts(file, [(0, 8)])[0])
    if length > LONGEST:
        raise ValueError("its header is too long")
    told, spans, end = {}, [], 0
    for name, tensor in _parse_header(place.parts(file, [(8, 8 + length)])[0]).items():
        start, stop = tensor.data_offsets
        if rows is not None and tensor.shape[:1] != (rows,):
            raise ValueError(f"'{name}' does not have the {rows} rows that {INDEX} tells")
        if only and name not in only:
            continue
        each = (stop - start) // (rows or 1)
        spans.append((8 + length + start, each))
        shape = tensor.shape if rows is None else tensor.shape[1:]
        told[name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": (end, end + each)}
        end += each
    text = json.dumps(told).encode()  # safetensors checks that all of it fits together
    return _Layout(struct.pack("<Q", len(text)) + text, spans)


def _parse_header(text: bytes) -> dict[str, _Tensor]:
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("its header is no table")
        found.pop("__metadata__", None)
        return _HEADER.validate_python(found)
    except (ValidationError, RecursionError) as error:
        raise ValueError("its header is damaged") from error
