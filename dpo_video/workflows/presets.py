"""The options beneath a file and flags: a backbone's, a recipe's and a tier's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dpo_video.errors import unknown
from dpo_video.estimation.tiers import find_tier
from dpo_video.settings import LARGEST_RANK, TrainSettings
from dpo_video.workflows.recipes import Recipe

Tables = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Presets:
    """The options of a recipe and of a tier, by path."""

    recipe: Recipe | None
    tier: str | None
    backbone: str
    published: Mapping[str, Any]
    """The recipe's, without those of strategies that were not chosen."""
    card: Mapping[str, Any]
    """The tier's. It lowers a recipe's numbers and raises none."""

    @classmethod
    def of(
        cls,
        recipe: Recipe | None,
        tier: str | None,
        names: Mapping[str, Any],
        model: str | None,
        tiers: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Self:
        """The options for a backbone and one of its models.

        Args:
            recipe: The recipe.
            tier: Name of the tier.
            names: Kind to the name of the chosen strategy.
            model: The backbone's model.
            tiers: The backbone's own presets by name of a tier.
        """
        backbone = names["backbone"]
        published, card = {}, {}
        if recipe is not None:
            chosen = recipe.strategies
            for path, setting in recipe.settings(backbone, model).items():
                kind, dot, _ = path.partition(".")
                if dot and chosen.get(kind) in (None, names.get(kind)):
                    published[path] = setting.value
        if tier is not None:
            found = find_tier(tier)
            own = (tiers or {}).get(found.name, {})
            for path, value in {**found.preset(backbone, model), **own}.items():
                old = published.get(path)
                both = _is_number(value) and _is_number(old)
                card[path] = min(value, old) if both else value
        return cls(recipe=recipe, tier=tier, backbone=backbone, published=published, card=card)

    def fill(self, tables: Tables, training: Mapping[str, Any], known: frozenset[str]) -> None:
        """Set the options that are not set yet.

        Args:
            tables: The options of the file and of the flags.
            training: The backbone's own [train].
            known: Names of the tables that exist.
        """
        train = dict(training)
        for options in (self.published, self.card):
            train = _over(train, {
                path.removeprefix("train."): value
                for path, value in options.items() if path.startswith("train.")
            })  # fmt: skip
        tables["train"] = _over(train, tables.get("train", {}))
        for path, value in {**self.published, **self.card}.items():
            head, *middle, last = path.split(".")
            if head not in known:
                raise unknown("table", head, known)
            node: Any = tables
            for part in (head, *middle):
                node = node.setdefault(part, {}) if isinstance(node, dict) else None
            if isinstance(node, dict):
                node.setdefault(last, value)

    def overridden_by(self, file: Path, tables: Tables) -> list[str]:
        """A note on the options of the tier that a file sets otherwise."""
        paths = [
            path
            for path, value in self.card.items()
            if value != "auto" and _at(tables, path) not in (None, value)
        ]
        if not paths:
            return []
        return [
            f"'{file}' sets {', '.join(paths)}, so the tier {self.tier} does not. Set them with "
            f"--set {paths[0]}=VALUE."
        ]

    def kept_from_pairs(self, made: Mapping[str, Any], tables: Tables) -> list[str]:
        """A note on options that the pairs set otherwise than the recipe or the tier."""
        asked = {**self.published, **self.card}
        kept = [
            f"{path}={value}"
            for path, value in made.items()
            if path in asked and asked[path] != value and _at(tables, path) == value
        ]
        if not kept:
            return []
        source = f"the tier {self.tier}" if self.tier else "the recipe"
        return [
            f"The pairs were made with {', '.join(kept)}, which {source} does not change. Build "
            "pairs with the same recipe and tier to use theirs."
        ]

    def departures(self, tables: Tables) -> list[str]:
        """Notes on a backbone that the recipe is not for, and on what the tier changed of it."""
        recipe, notes = self.recipe, []
        if recipe is None:
            return []
        if recipe.backbone and self.backbone not in recipe.backbone:
            notes.append(
                f"The recipe {recipe.name} is for {' and '.join(recipe.backbone)}. On "
                f"{self.backbone} its general values hold; guidance, size and precision are the "
                "backbone's."
            )
        changed = {
            path: self.card[path]
            for path, value in self.published.items()
            if self.card.get(path, value) != value and _at(tables, path) == self.card[path]
        }
        if "train.rank" in changed:
            changed["train.alpha"] = tables["train"]["alpha"]
        if changed:
            old = {path: self.published.get(path, "unset") for path in changed}
            texts = [f"{path} {old[path]} to {value}" for path, value in changed.items()]
            path = next(iter(changed))
            notes.append(
                f"The tier {self.tier} changes the recipe {recipe.name}: {', '.join(texts)}. Keep "
                f"a value with --set {path}={old[path]}."
            )
        return notes


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _over(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """[train] with other options over it."""
    merged, rank = {**options, **given}, given.get("rank")
    if isinstance(rank, int | float) and 0 < rank <= LARGEST_RANK and "alpha" not in given:
        # LoRA scales its update by alpha / rank: another rank keeps that scale.
        fields = TrainSettings.model_fields
        before, alpha = (options.get(name, fields[name].default) for name in ("rank", "alpha"))
        if _is_number(before) and _is_number(alpha) and before > 0:
            merged["alpha"] = rank * alpha / before
    return merged


def _at(tables: Tables, path: str) -> Any:
    """The value of an option; None if it is not set."""
    node: Any = tables
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
