"""Entry points of the groups `dpo_video.KIND`, read without importing anything they name."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any

from dpo_video.text import one_line

PLUGINS = "DPO_VIDEO_PLUGINS"
"""Environment variable: `off`, or the only packages whose entry points count, with commas."""
_OURS = "dpo-video"
_GROUP = re.compile(r"dpo_video\.([a-z_]+)")
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
        """The module; "" if the value names none."""
        return (match["module"] if (match := _VALUE.fullmatch(self.value)) else "") or ""

    @property
    def attr(self) -> str:
        """The name in the module."""
        return (match["attr"] if (match := _VALUE.fullmatch(self.value)) else "") or ""

    @property
    def package(self) -> str:
        """Normalised name of the distribution, without its version."""
        return _normalised(self.distribution.partition(" ")[0])

    @property
    def qualified(self) -> str:
        """A name that no other package can have: `package:name`."""
        return f"{self.package}:{self.name}"

    @property
    def built_in(self) -> bool:
        """Whether this package provides it."""
        return self.module.partition(".")[0] == __name__.partition(".")[0]

    @property
    def can_be_typed(self) -> bool:
        """Whether the name is valid on a command line and in a TOML file."""
        return _NAME.fullmatch(self.name) is not None

    def load(self) -> Any:
        """Import the object; may raise anything."""
        return EntryPoint(self.name, self.value, f"dpo_video.{self.kind}").load()


@functools.cache
def _scan() -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    entries: list[Entry] = []
    unreadable: list[str] = []
    seen: set[str] = set()
    wanted = _wanted()
    for distribution in distributions():
        if wanted is not None and _normalised(_called(distribution).split()[0]) not in wanted:
            continue
        try:
            if "dpo_video." not in (distribution.read_text("entry_points.txt") or ""):
                continue
            points = [each for each in distribution.entry_points if _GROUP.fullmatch(each.group)]
        except Exception as error:  # a damaged file may raise anything
            if _offers(distribution, error):
                unreadable.append(
                    f"{_called(distribution)} provides strategies, but its entry points cannot be "
                    f"read ({one_line(str(error))}). Install it again."
                )
            continue
        if not points:
            continue
        called = _called(distribution)
        if (name := _normalised(called.partition(" ")[0])) in seen:
            continue  # another copy further down the path
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
    """The entry points of all kinds, built-in ones included."""
    return _scan()[0]


def unreadable() -> tuple[str, ...]:
    """One sentence for each distribution whose entry points cannot be read."""
    return _scan()[1]


def forget() -> None:
    """Clear the cache, after something was installed."""
    _scan.cache_clear()


def _wanted() -> set[str] | None:
    """The packages whose entry points count; None for all."""
    given = os.environ.get(PLUGINS, "").strip()
    if not given:
        return None
    names = set() if given.lower() == "off" else {_normalised(n) for n in given.split(",")}
    return {_OURS, *names}


def _normalised(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _called(distribution: Distribution) -> str:
    """Name and version of a distribution, as far as its metadata gives them."""
    try:
        name, version = distribution.metadata["Name"], distribution.metadata["Version"]
    except Exception:  # missing or unreadable metadata
        name, version = None, None
    if not name:
        return "a package without a name"
    return one_line(f"{name} {version or 'without a version'}")


def _offers(distribution: Distribution, error: Exception) -> bool:
    """Whether an unreadable file of entry points has groups of ours."""
    if isinstance(error, UnicodeDecodeError):
        return b"dpo_video." in error.object
    try:
        return "dpo_video." in (distribution.read_text("entry_points.txt") or "")
    except Exception:
        return False
