"""pairs.jsonl: one line a pair, in any order, for several workers write at once."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from dpo_video.errors import StoreError, first_fault


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """One line of pairs.jsonl.

    A dataclass, for a set may have a hundred thousand: pydantic reads them in a quarter of the time
    that its own models take, and into a third of the memory.
    """

    __pydantic_config__ = ConfigDict(
        extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    index: Annotated[int, Field(ge=0)]
    prompt: str
    context: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """The name of the encoded prompt's file: a hash, so that no other folder can be named."""
    source: str
    strength: float
    region_share: float
    """The region's share of the latent elements."""
    preference: tuple[Annotated[float, Field(allow_inf_nan=True)], ...]
    """The pair's own, per latent frame. What is not finite is for `dpo-video check` to find."""

    @property
    def key(self) -> str:
        """What the pair is called in names of files and in messages."""
        return f"{self.index:05d}"

    def line(self) -> bytes:
        """As it is written, without the line break."""
        return _ONE.dump_json(self)


AT_ONCE = 5000  # lines, for which pydantic needs memory of its own
_ONE = TypeAdapter(PairRecord)
_MANY = TypeAdapter(list[PairRecord])


def checked(**fields: Any) -> PairRecord:
    """A row whose line can be read again; a ValidationError for what cannot be one."""
    return _ONE.validate_python(fields)


def parse(lines: list[bytes], path: str, before: int = 0) -> list[PairRecord]:
    """Read lines; `before` are the lines of the file in front of them.

    Raises:
        StoreError: naming the first line that is none.
    """
    rows = []
    with _uncollected():
        for start in range(0, len(lines), AT_ONCE):
            rows += _parse(lines[start : start + AT_ONCE], path, before + start)
    return rows


def _parse(lines: list[bytes], path: str, before: int) -> list[PairRecord]:
    try:
        rows = _MANY.validate_json(b"[" + b",".join(lines) + b"]")
        if len(rows) == len(lines):
            return rows
    except ValidationError:
        pass  # one by one, then, for the number of the line
    rows = []
    for number, line in enumerate(lines, start=before + 1):
        try:
            rows.append(_ONE.validate_json(line))
        except ValidationError as error:
            raise StoreError(
                f"Line {number} of '{path}' cannot be read ({first_fault(error)}). Delete that "
                "line and build again: the rest is kept."
            ) from error
    return rows


@contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no garbage meanwhile: there is none, and the search goes through all of torch."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class PairIndex:
    """The pairs that there are: those before the first that is missing, in order.

    The others wait until it is there.
    """

    def __init__(self) -> None:
        self.ready: list[PairRecord] = []
        self.waiting: dict[int, PairRecord] = {}
        self.lines = 0

    def __contains__(self, index: int) -> bool:
        return index < len(self.ready) or index in self.waiting

    def __len__(self) -> int:
        return len(self.ready) + len(self.waiting)

    def add(self, rows: Iterable[PairRecord], path: str) -> None:
        """Put them where they belong; of equal ones the first.

        Raises:
            StoreError: if two lines say different things of one pair.
        """
        for row in rows:
            self.lines += 1
            if row.index == len(self.ready):
                self.ready.append(row)
                while (following := self.waiting.pop(len(self.ready), None)) is not None:
                    self.ready.append(following)
            elif row.index not in self:
                self.waiting[row.index] = row
            elif row != self._at(row.index):
                raise StoreError(
                    f"Line {self.lines} of '{path}' says something else of pair {row.index} than "
                    "a line before it. Delete that line and build again: the rest is kept."
                )

    def _at(self, index: int) -> PairRecord:
        return self.ready[index] if index < len(self.ready) else self.waiting[index]
