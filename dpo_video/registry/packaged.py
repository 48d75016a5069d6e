"""Files in the packages that entry points name: recipes, tiers, configurations of models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dpo_video.errors import PluginError
from dpo_video.registry.entry_points import Entry


def called(entry: Entry) -> str:
    """The entry point in words."""
    return f"The {entry.kind} '{entry.name}' of {entry.distribution}"


def folder_of(entry: Entry) -> Path:
    """The folder of the package that an entry point names; the package itself is not imported.

    Raises:
        PluginError: if there is no such package.
    """
    try:
        spec = importlib.util.find_spec(entry.module)
    except Exception as error:  # it imports the packages around it
        raise PluginError(
            f"{called(entry)} names '{entry.module}', which fails: {error}."
        ) from error
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise PluginError(
            f"{called(entry)} names '{entry.module}', which is no package. Correct it."
        )
    return Path(folders[0])
