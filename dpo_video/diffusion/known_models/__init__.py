"""Configurations of known models, without their weights.

    index.json      name -> backbone, ids on the hub, parameters of the denoiser
    NAME/...        a checkpoint folder in diffusers' layout with its config.json files only

With them, `--set backbone.model=NAME` works, and `dpo-video estimate` needs no network connection.
The values are those of the published config.json files; ids with equal shapes share a folder. A
test counts the parameters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

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

    @property
    def folder(self) -> Path:
        """The checkpoint folder without weights."""
        return FOLDER / self.name


@cache
def known_models() -> tuple[KnownModel, ...]:
    """All known models, sorted by name."""
    index = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
    return tuple(
        KnownModel(
            name=name,
            backbone=entry["backbone"],
            hub=tuple(entry["hub"]),
            parameters=entry["parameters"],
        )
        for name, entry in sorted(index.items())
    )


def find_model(source: str) -> KnownModel | None:
    """The model with a name or hub id, in any case; None if unknown."""
    wanted = source.lower()
    for model in known_models():
        if wanted in (model.name, *(hub.lower() for hub in model.hub)):
            return model
    return None
