"""The index pairs.jsonl: one line per pair, in any order, because several workers append to it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from dpo_video.errors import StoreError, first_fault


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """One line of pairs.jsonl.

    A dataclass, because a set may have a hundred thousand pairs: pydantic reads dataclasses in a
    quarter of the time of its own models, into a third of the memory.
    """

    __pydantic_config__ = ConfigDict(
        extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    index: Annotated[int, Field(ge=0)]
    prompt: str
    context: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """Name of the encoded prompt's file: a hash, so that it cannot name another folder."""
    source: str
    strength: float
    region_share: float
    """The region's share of the latent elements."""
    preference: tuple[Annotated[float, Field(allow_inf_nan=True)], ...]
    """Per latent frame, before any labels. `dpo-video check` reports values that are not finite."""
    latents_hash: Annotated[str, Field(pattern=r"^([0-9a-f]{16})?$")] = ""
    """Hash of the pair's tensors, checked when they are read; "" for none."""
    context_hash: Annotated[str, Field(pattern=r"^([0-9a-f]{16})?$")] = ""
    """The same of the encoded prompt's."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Ranks of the samples of a group (`Pair.ranks`); empty for a pair."""

    @property
    def key(self) -> str:
        """The pair's name in files and messages."""
        return f"{self.index:05d}"

    @property
    def latents_file(self) -> str:
        """Name of the pair's file in the store, without suffix."""
        return f"latents/{self.key}"

    @property
    def context_file(self) -> str:
        """Name of the encoded prompt's file in the store, without suffix."""
        return f"contexts/{self.context}"

    def line(self) -> bytes:
        """The line in the file, without the line break."""
        usual = {"weight": 1.0, "ranks": ()}
        return _ONE.dump_json(self, exclude={k for k, v in usual.items() if getattr(self, k) == v})


BLOCK = 5000  # lines parsed at once; bounds pydantic's temporary memory
_ONE = TypeAdapter(PairRecord)
_MANY = TypeAdapter(list[PairRecord])


def checked(**fields: Any) -> PairRecord:
    """A record whose line can be read again; a ValidationError if it could not."""
    return _ONE.validate_python(fields)


def parse(lines: list[bytes], path: str, before: int = 0) -> list[PairRecord]:
    """Parse lines; `before` is the number of lines that precede them in the file.

    Raises:
        StoreError: names the first line that is invalid.
    """
    records = []
    with _no_garbage_collection():
        for start in range(0, len(lines), BLOCK):
            records += _parse(lines[start : start + BLOCK], path, before + start)
    return records


def _parse(lines: list[bytes], path: str, before: int) -> list[PairRecord]:
    try:
        records = _MANY.validate_json(b"[" + b",".join(lines) + b"]")
        if len(records) == len(lines):
            return records
    except ValidationError:
        pass  # parse them one by one, to find the number of the line
    records = []
    for number, line in enumerate(lines, start=before + 1):
        try:
            records.append(_ONE.validate_json(line))
        except ValidationError as error:
            raise StoreError(
                f"Line {number} of '{path}' cannot be read ({first_fault(error)}). Delete that "
                "line and build again: the rest is kept."
            ) from error
    return records


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector: parsing makes no cycles, and a collection scans all of torch."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class PairIndex:
    """The records of a store: `ready` holds those before the first missing pair, in order.

    `waiting` holds the others until the missing ones are added.
    """

    def __init__(self) -> None:
        self.ready: list[PairRecord] = []
        self.waiting: dict[int, PairRecord] = {}
        self.lines = 0

    def __contains__(self, index: int) -> bool:
        return index < len(self.ready) or index in self.waiting

    def __len__(self) -> int:
        return len(self.ready) + len(self.waiting)

    def __iter__(self) -> Iterator[PairRecord]:
        return itertools.chain(self.ready, self.waiting.values())

    def add(self, records: Iterable[PairRecord], path: str) -> None:
        """Add records in any order; repeated equal ones are ignored.

        Raises:
            StoreError: if two lines of a pair differ.
        """
        for record in records:
            self.lines += 1
            if record.index == len(self.ready):
                self.ready.append(record)
                while (following := self.waiting.pop(len(self.ready), None)) is not None:
                    self.ready.append(following)
            elif record.index not in self:
                self.waiting[record.index] = record
            elif record != self._at(record.index):
                raise StoreError(
                    f"Line {self.lines} of '{path}' differs from an earlier line of pair "
                    f"{record.index}. Delete that line and build again: the rest is kept."
                )

    def _at(self, index: int) -> PairRecord:
        return self.ready[index] if index < len(self.ready) else self.waiting[index]
