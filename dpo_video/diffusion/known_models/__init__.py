"""Configurations of known models, without their weights.

    index.json      name -> backbone, ids on the hub, parameters of the denoiser
    NAME/...        a checkpoint folder in diffusers' layout with its config.json files only

An entry point of the group `dpo_video.model` names a package with such files: this one, or one of
a plugin. With them, `--set backbone.model=NAME` works, and `dpo-video estimate` needs no network
connection. The values are those of the published config.json files; ids with equal shapes share a
folder. A test counts the parameters.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

from dpo_video.errors import PluginError, UserError
from dpo_video.registry.entry_points import Entry, entries
from dpo_video.registry.packaged import called, folder_of
from dpo_video.support.reading import read_bytes

KIND = "model"
"""Of the entry points' group, `dpo_video.model`."""
FOLDER = Path(__file__).parent


@final
@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model, or a part of one, whose configuration ships with the package."""

    name: str
    backbone: str
    """Name of its backbone."""
    hub: tuple[str, ...]
    """Its hub ids; `name` stands for the first."""
    parameters: int
    """Parameters of its denoiser, or of both experts."""

    folder: Path
    """The checkpoint folder without weights."""
    distribution: str
    """Package that it comes from, and its version."""


def known_models() -> tuple[KnownModel, ...]:
    """All known models, sorted by name; of two of one name, ours, or the first."""
    return _known(entries())


@cache
def _known(installed: tuple[Entry, ...]) -> tuple[KnownModel, ...]:
    found: dict[str, KnownModel] = {}
    for entry in sorted(installed, key=lambda entry: (not entry.built_in, entry.package)):
        if entry.kind == KIND:
            with suppress(UserError):  # a plugin's fault is none of the others
                for model in models_of(entry):
                    found.setdefault(model.name, model)
    return tuple(found[name] for name in sorted(found))


def models_of(entry: Entry) -> list[KnownModel]:
    """The models of an entry point.

    Raises:
        PluginError: if its index.json cannot be read.
    """
    folder = folder_of(entry)
    try:
        index = json.loads(read_bytes(folder / "index.json"))
        return [
            KnownModel(
                name=name,
                backbone=str(each["backbone"]),
                hub=tuple(each["hub"]),
                parameters=int(each["parameters"]),
                folder=folder / name,
                distribution=entry.distribution,
            )
            for name, each in index.items()
        ]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise PluginError(
            f"{called(entry)} cannot be read ({error}). Correct '{folder / 'index.json'}': a "
            "backbone, a list of hub ids and the number of parameters for each name."
        ) from error


def find_model(source: str) -> KnownModel | None:
    """The model with a name or hub id, in any case; None if unknown."""
    wanted = source.lower()
    for model in known_models():
        if wanted in (model.name, *(hub.lower() for hub in model.hub)):
            return model
    return None
