"""Recipes: the hyper-parameters of a paper, read from TOML files by name. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Self, final

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dpo_video import registry
from dpo_video.diffusion.known_models import find_model
from dpo_video.errors import PluginError, UserError, first_fault
from dpo_video.registry import Listing
from dpo_video.registry.entry_points import Entry
from dpo_video.registry.packaged import called, folder_of
from dpo_video.support.formatting import option
from dpo_video.support.reading import read_toml

KIND = "recipe"
"""Of the entry points' group, `dpo_video.recipe`."""


@final
class Setting(BaseModel):
    """The value of one option, and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    value: Any
    """The option's value, as in a run.toml."""
    source: str
    """The place in the recipe's source that states it."""
    paper: str | None = None
    """The published value, where `value` differs from it."""
    why: str = ""
    """Why it differs."""

    @property
    def text(self) -> str:
        """The value for people: numbers as typed on a command line."""
        values = self.value if isinstance(self.value, list) else [self.value]
        return ", ".join(option(v) if type(v) in (int, float) else str(v) for v in values)

    @model_validator(mode="after")
    def _is_explained(self) -> Self:
        if (self.paper is None) == bool(self.why):
            raise ValueError("give both `paper` and `why`, or neither")
        return self


Settings = Mapping[str, Setting]


@final
class Recipe(BaseModel):
    """The settings of a paper, by option path; the path of a strategy is its kind."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Name for `--recipe`."""
    distribution: str
    """Package that it comes from, and its version."""
    summary: str
    """What it is, in a line."""
    source: str
    """The paper or the file that `Setting.source` refers to."""
    extends: str | None = None
    """Name of a recipe whose settings hold where this one has none."""
    options: dict[str, Setting] = {}
    """Settings for every backbone, strategies among them."""
    backbone: dict[str, dict[str, Setting]] = {}
    """Backbone name to further settings: the families that the recipe is for."""
    model: dict[str, dict[str, Setting]] = {}
    """Model name, as its configuration ships, to further settings."""

    @model_validator(mode="after")
    def _names_strategies(self) -> Self:
        for kind in self.strategies:
            if kind not in registry.KINDS or kind in ("backbone", "format", *registry.SEVERAL):
                raise ValueError(f"a recipe chooses no '{kind}'; options are like 'train.rank'")
        return self

    def settings(self, backbone: str, model: str | None = None) -> Settings:
        """All settings for a backbone, and for one of its models under any of its names."""
        found = find_model(model) if model is not None else None
        own = self.model.get(found.name, {}) if found and found.backbone == backbone else {}
        return {**self.options, **self.backbone.get(backbone, {}), **own}

    @property
    def strategies(self) -> dict[str, str]:
        """Kind to the name of a strategy."""
        return {path: str(each.value) for path, each in self.options.items() if "." not in path}

    @property
    def groups(self) -> dict[str, Settings]:
        """The settings by what they hold for, in words."""
        return {"every backbone": self.options, **self.backbone, **self.model}


def recipe_names() -> list[str]:
    """The names of the installed recipes, sorted; no file is read."""
    return sorted(registry.named(KIND))


def listings() -> list[Listing]:
    """The installed recipes, described; the summary of a damaged one says so."""
    found = []
    for name, same in sorted(registry.named(KIND).items()):
        for entry in same:
            try:
                summary = _read(entry).summary
            except UserError as error:
                summary = str(error)
            found.append(
                Listing(kind=KIND, name=name, distribution=entry.distribution, summary=summary)
            )
    return found


def find_recipe(name: str) -> Recipe:
    """The recipe of a name, with the settings of those that it extends.

    Raises:
        UserError: for an unknown name.
        PluginError: for a name that several packages use, or a file that cannot be read.
    """
    recipe = _read(registry.find(KIND, name))
    if recipe.extends is None:
        return recipe
    if recipe.extends == name or (base := find_recipe(recipe.extends)).extends is not None:
        raise PluginError(
            f"The recipe '{name}' of {recipe.distribution} extends '{recipe.extends}', which "
            "extends another. Extend one that stands alone."
        )
    merged = {
        kind: {
            key: {**getattr(base, kind).get(key, {}), **getattr(recipe, kind).get(key, {})}
            for key in {**getattr(base, kind), **getattr(recipe, kind)}
        }
        for kind in ("backbone", "model")
    }
    return recipe.model_copy(update={"options": {**base.options, **recipe.options}, **merged})


def recipe_for(backbone: str, pairs: str | None, loss: str) -> str | None:
    """Name of a recipe for a backbone, a kind of pairs and a loss; None if there is none."""
    for name in recipe_names():
        try:
            recipe = find_recipe(name)
        except UserError:  # a plugin's fault is none of a run without it
            continue
        chosen = recipe.strategies
        if (
            recipe.extends is None
            and backbone in recipe.backbone
            and (chosen.get("pairs"), chosen.get("loss")) == (pairs, loss)
        ):
            return name
    return None


@cache
def _read(entry: Entry) -> Recipe:
    """The recipe of an entry point: the file NAME.toml of the package that it names."""
    path = folder_of(entry) / f"{entry.name}.toml"
    try:
        table = read_toml(path)
        recipe = Recipe(**{**table, "name": entry.name, "distribution": entry.distribution})
    except (OSError, ValueError, TypeError) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else str(error)
        raise PluginError(
            f"{called(entry)} cannot be read ({reason}). Correct '{path}'."
        ) from error
    return recipe
