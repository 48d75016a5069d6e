"""The classes of a kind as attributes of its package, imported when they are first used."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from dpo_video import registry
from dpo_video.registry.entry_points import entries


def lazy(kind: str, package: str = "") -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for the package of a kind, plugins' classes included."""

    def get(name: str) -> Any:
        for entry in entries():
            if (entry.kind, entry.attr) == (kind, name):
                return registry.load(kind, entry.name)
        lower = {each.lower(): each for each in names()}
        near = difflib.get_close_matches(name.lower(), lower, n=1)
        hint = f". Did you mean '{lower[near[0]]}'?" if near else ""
        raise AttributeError(
            f"module 'dpo_video.{package or kind}' has no attribute '{name}'{hint}"
        )

    def names() -> list[str]:
        return sorted({entry.attr for entry in entries() if entry.kind == kind})

    return get, names
