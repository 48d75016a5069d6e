"""What is installed: strategies, their options, and recipes. Listing imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpo_video import registry
from dpo_video.errors import UserError
from dpo_video.registry import local
from dpo_video.registry.entry_points import unreadable
from dpo_video.workflows import recipes


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Installed strategies and recipes."""

    kinds: Sequence[str]
    strategies: Sequence[registry.Listing]
    unreadable: Sequence[str]
    """One sentence for each package whose entry points cannot be read, or have no known group."""

    def to_dict(self) -> list[dict[str, Any]]:
        """One row per strategy."""
        return [asdict(listing) for listing in self.strategies]


@dataclass(frozen=True, kw_only=True)
class Description:
    """A strategy or a table of options."""

    kind: str
    name: str | None
    doc: str
    options: Sequence[registry.Option]

    def to_dict(self) -> dict[str, Any]:
        """The description as plain values."""
        return asdict(self)


def list_strategies(kind: str | None = None) -> Catalog:
    """The installed strategies of a kind, or of all kinds; recipes count as one."""
    kinds = [kind] if kind else [*registry.PYTHON, recipes.KIND]
    return Catalog(
        kinds=kinds,
        strategies=[
            listing
            for each in kinds
            for listing in (recipes.listings() if each == recipes.KIND else registry.listings(each))
        ],
        unreadable=[*unreadable(), *registry.unknown_groups()],
    )


def show_strategy(kind: str, name: str | None = None) -> Description:
    """What a strategy does, and its options; or those of a table such as [train].

    Raises:
        UserError: for an unknown kind or name.
    """
    from dpo_video.workflows.tables import ENGINES

    if kind in ENGINES:
        model, path = ENGINES[kind], kind
    elif kind == "command":
        name = name or "NAME"
        raise UserError(f"A command explains itself: dpo-video {name} --help")
    elif name is None:
        registry.check_kind(kind)
        raise UserError(f"show {kind} needs a NAME (see `dpo-video list {kind}`).")
    else:
        if local.is_file(name):  # typed, so the file may run
            local.allow(name)
        model = registry.load(registry.check_kind(kind), name)
        path = f"{kind}.{registry.short_name(name)}" if kind in registry.SEVERAL else kind
    return Description(
        kind=kind,
        name=name,
        doc=inspect.cleandoc(model.__doc__ or ""),
        options=registry.options(model, path),
    )
