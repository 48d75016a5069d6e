"""What distributions offer under `dpo_video.KIND`, however badly some of them are made.

No torch here, and nothing of what is found is imported.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any

from dpo_video.errors import one_line

_GROUP = re.compile(r"dpo_video\.([a-z]+)")
_VALUE = re.compile(r"(?P<module>[\w.]+)\s*(:\s*(?P<attr>[\w.]+))?\s*(\[.*\])?")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry point."""

    kind: str
    name: str
    value: str
    distribution: str
    """Name and version."""

    @property
    def module(self) -> str:
        """Where it is; "" where its value names nothing."""
        return (match["module"] if (match := _VALUE.fullmatch(self.value)) else "") or ""

    @property
    def attr(self) -> str:
        """What it is called there."""
        return (match["attr"] if (match := _VALUE.fullmatch(self.value)) else "") or ""

    @property
    def can_be_typed(self) -> bool:
        """Whether a command line and a TOML file can take its name."""
        return _NAME.fullmatch(self.name) is not None

    def load(self) -> Any:
        """Import it; may raise anything."""
        return EntryPoint(self.name, self.value, f"dpo_video.{self.kind}").load()


@functools.cache
def _scan() -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    entries: list[Entry] = []
    unreadable: list[str] = []
    seen: set[str] = set()
    for distribution in distributions():
        try:
            points = [each for each in distribution.entry_points if _GROUP.fullmatch(each.group)]
        except Exception as error:  # a file that somebody has damaged may raise anything
            if _offers(distribution, error):
                unreadable.append(
                    f"{_called(distribution)} offers strategies, but its entry points cannot be "
                    f"read ({one_line(str(error))}). Install it again."
                )
            continue
        if not points:
            continue
        called = _called(distribution)
        if (name := called.partition(" ")[0].lower()) in seen:
            continue  # another copy of it, further down the path
        seen.add(name)
        entries += [
            Entry(
                kind=point.group.partition(".")[2],
                name=point.name,
                value=point.value,
                distribution=called,
            )
            for point in points
        ]
    return tuple(entries), tuple(unreadable)


def entries() -> tuple[Entry, ...]:
    """Those of all kinds, built-in ones included."""
    return _scan()[0]


def unreadable() -> tuple[str, ...]:
    """A sentence for every distribution whose entry points cannot be read."""
    return _scan()[1]


def forget() -> None:
    """Look again: something was installed since."""
    _scan.cache_clear()


def _called(distribution: Distribution) -> str:
    """Name and version, as far as its metadata says them."""
    try:
        name, version = distribution.metadata["Name"], distribution.metadata["Version"]
    except Exception:  # no metadata, or none that can be read
        name, version = None, None
    if not name:
        return "a package without a name"
    return one_line(f"{name} {version or 'of no version'}")


def _offers(distribution: Distribution, error: Exception) -> bool:
    """Whether an unreadable file of entry points has any for us."""
    if isinstance(error, UnicodeDecodeError):
        return b"dpo_video." in error.object
    try:
        return "dpo_video." in (distribution.read_text("entry_points.txt") or "")
    except Exception:
        return False
