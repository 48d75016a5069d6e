"""The configurations of known models, without their weights.

    index.json      name -> backbone, ids on the hub, parameters of the denoiser
    NAME/...        a checkpoint folder in diffusers' layout that holds its config.json files only

So `--set backbone.model=NAME` works, and `fit` knows a model's shape without a network. The values
are those of the published config.json files; several ids of one shape share a folder. The number of
parameters is that of the published weights, which a test counts again.
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
    """A model, or a part of one, whose configuration ships in the package."""

    name: str
    backbone: str
    """The name of the family that runs it."""
    hub: tuple[str, ...]
    """Its ids on the hub, the one that `name` stands for first."""
    parameters: int
    """Of its denoiser; of both experts where there are two."""

    @property
    def folder(self) -> Path:
        """The checkpoint folder without weights."""
        return FOLDER / self.name


@cache
def known_models() -> tuple[KnownModel, ...]:
    """All of them, by name."""
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
    """The model of a name or an id on the hub, in capitals or not; None if it is not known."""
    wanted = source.lower()
    for model in known_models():
        if wanted in (model.name, *(hub.lower() for hub in model.hub)):
            return model
    return None
