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
from collections.abc import Collection, Mapping
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
class _Header:
    tensors: Mapping[str, _Tensor]
    start: int
    """The file's byte that the tensors' offsets count from."""


@final
class Shards:
    """The shards of a store, open for reading from any number of threads."""

    def __init__(self, place: Place, index: ShardIndex) -> None:
        self._place = place
        self._at = {
            name: (shard, row) for shard in index.shards for row, name in enumerate(shard.holds)
        }
        self._headers: dict[str, _Header] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def file(self, name: str) -> str:
        """The shard that holds it."""
        return self._at[name][0].file

    def read(self, name: str, only: Collection[str] = ()) -> dict[str, Tensor]:
        """The tensors of a pair or a prompt, all or some.

        Raises:
            OSError: if the shard is missing or damaged.
            ValueError: if it is not what the index says.
        """
        shard, row = self._at[name]
        header = self._headers.get(shard.file)
        if header is None:  # twice from two threads does no harm
            header = self._headers[shard.file] = read_header(self._place, shard.file)
        rows = len(shard.holds)
        wanted = {}
        for tensor, told in header.tensors.items():
            begin, end = told.data_offsets
            if told.shape[:1] != (rows,) or (end - begin) % rows or end < begin:
                raise ValueError(f"'{tensor}' does not have the {rows} rows that {INDEX} tells")
            each = (end - begin) // rows
            if not only or tensor in only:
                wanted[tensor] = _Tensor(
                    dtype=told.dtype,
                    shape=told.shape[1:],
                    data_offsets=(begin + row * each, begin + (row + 1) * each),
                )
        return _read(self._place, shard.file, _Header(wanted, header.start))


def read_some(place: Place, file: str, only: Collection[str]) -> dict[str, Tensor]:
    """Some tensors of a safetensors file, without reading the others; errors as `Shards.read`."""
    header = read_header(place, file)
    wanted = {name: told for name, told in header.tensors.items() if name in only}
    return _read(place, file, _Header(wanted, header.start))


def read_header(place: Place, file: str) -> _Header:
    """What a safetensors file says of itself; OSError or ValueError if it is none of ours."""
    (length,) = struct.unpack("<Q", place.parts(file, [(0, 8)])[0])
    if length > LONGEST:
        raise ValueError("its header is too long")
    (text,) = place.parts(file, [(8, 8 + length)])
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("its header is no table")
        found.pop("__metadata__", None)
        return _Header(_HEADER.validate_python(found), 8 + length)
    except (ValidationError, RecursionError) as error:
        raise ValueError("its header is damaged") from error


def _read(place: Place, file: str, header: _Header) -> dict[str, Tensor]:
    """Fetch the bytes and let safetensors make tensors of them, and check them."""
    spans = [tensor.data_offsets for tensor in header.tensors.values()]
    parts = place.parts(file, [(header.start + a, header.start + b) for a, b in spans])
    told, end = {}, 0
    for (name, tensor), part in zip(header.tensors.items(), parts, strict=True):
        offsets = (end, end + len(part))
        told[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        end += len(part)
    text = json.dumps(told).encode()
    return load(struct.pack("<Q", len(text)) + text + b"".join(parts))
