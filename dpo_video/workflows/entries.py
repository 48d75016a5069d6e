"""The entries of `dpo-video compare`: tables of TOML files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dpo_video import registry
from dpo_video.errors import UserError, unknown
from dpo_video.paths import check_name
from dpo_video.support.reading import read_toml
from dpo_video.workflows import config as configs
from dpo_video.workflows.config import Config
from dpo_video.workflows.tables import ENGINES

_KINDS = ("pairs", *configs.TRAINED_BY, "backbone", "labeler")
_KEYS = {*_KINDS, "recipe", "set", "seeds"}
_RESERVED = ("pairs", "comparison.json", "comparison.md", "frontier.svg", "index.html")
_QUIET = {"train.report_to": "none", "train.validation_videos": 0, "build.previews": False}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A named entry of a file."""

    name: str
    file: Path
    table: Mapping[str, Any] | None
    """None if the file as a whole is a run.toml."""

    @property
    def seeds(self) -> list[int]:
        """The training seeds that the entry names; 0 by default."""
        seeds = (self.table or {}).get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or any(type(n) is not int for n in seeds):
            raise UserError(
                f"Entry '{self.name}' of '{self.file}': seeds is a list of numbers, as in "
                "seeds = [0, 1, 2]."
            )
        return seeds

    def resolve(self, flags: Mapping[str, Any], recipe: str | None = None) -> Config:
        """The run's configuration, from a recipe unless the entry names another."""
        try:
            if self.table is None:
                return configs.resolve(recipe=recipe, file=self.file, flags={**_QUIET, **flags})
            return configs.resolve(
                recipe=self.table.get("recipe", recipe),
                choices={kind: self.table.get(kind) for kind in _KINDS},
                shared=[*_texts(_QUIET), *self.table.get("set", [])],
                flags=flags,  # they override those of one entry
            )
        except UserError as error:
            raise UserError(f"Entry '{self.name}' of '{self.file}': {error}") from error


@dataclass(frozen=True, kw_only=True)
class Entries:
    """All entries of some files, and their [selection]."""

    entries: list[Entry]
    selection_prompts: int = 0
    selection_seeds: tuple[int, ...] = ()


def _texts(flags: Mapping[str, Any]) -> list[str]:
    return [f"{path}={json.dumps(v)}" for path, v in flags.items() if v is not None]


def read_entries(paths: Sequence[Path | str] | None) -> Entries:
    """The entries of TOML files, by default of the package's own.

    Raises:
        UserError: for a file or an entry that cannot be read.
    """
    found: list[Entry] = []
    selection: dict[str, Any] = {}
    for path in map(Path, paths or [str(files("dpo_video.workflows") / "compare.toml")]):
        try:
            tables = read_toml(path)
        except OSError as error:
            raise UserError(
                f"Cannot read '{path}': {error.strerror}. Name a TOML file of entries, or the "
                "folder of a finished run."
            ) from error
        except ValueError as error:
            raise UserError(f"'{path}' is not valid TOML: {error}. Correct it.") from error
        if tables.keys() & {*ENGINES, *registry.KINDS}:
            name = path.resolve().parent.name if path.name == "run.toml" else path.stem
            found.append(Entry(name=name, file=path, table=None))
            continue
        selection = (
            _selection(tables.pop("selection"), path) if "selection" in tables else selection
        )
        for name, table in tables.items():
            if not isinstance(table, dict) or (strange := sorted(table.keys() - _KEYS)):
                wrong = f"'{strange[0]}'" if isinstance(table, dict) else "no table"
                raise UserError(
                    f"Entry '{name}' of '{path}' has {wrong}. An entry is [NAME] with "
                    f"{', '.join(sorted(_KEYS))}; options go into set = "
                    '["train.learning_rate=1e-4"].'
                )
            _check_types(name, path, table)
            found.append(Entry(name=name, file=path, table=table))
    names = [check_name(entry.name, "an entry") for entry in found]
    if reserved := next((name for name in names if name.lower() in _RESERVED), None):
        raise UserError(f"An entry cannot be named '{reserved}', as a file of the report is.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"Two entries are named '{twice}'. Rename one of them.")
    if not found:
        raise UserError('The files name no entry. Write one: [NAME] and pairs = "local".')
    return Entries(entries=found, **selection)


def _check_types(name: str, path: Path, table: Mapping[str, Any]) -> None:
    """A UserError unless strategies are names and `set` is a list of texts."""
    names = (*_KINDS, "recipe")
    wrong = next((kind for kind in names if not isinstance(table.get(kind, ""), str)), None)
    options = table.get("set", [])
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        wrong = "set"
    if wrong:
        form = 'set = ["train.learning_rate=1e-4"]' if wrong == "set" else f'{wrong} = "NAME"'
        raise UserError(f"Entry '{name}' of '{path}': {wrong} has another form. Write {form}.")


def _selection(table: Any, path: Path) -> dict[str, Any]:
    """The fields of `Entries` that a file's table [selection] sets."""
    try:
        prompts, seeds = table.pop("prompts", 0), table.pop("seeds", [])
        if type(prompts) is int and all(type(seed) is int for seed in seeds) and not table:
            return {"selection_prompts": prompts, "selection_seeds": tuple(seeds)}
    except (AttributeError, TypeError):  # not a table, or not a list
        pass
    raise UserError(
        f"[selection] of '{path}' takes prompts and seeds only: prompts = 16, seeds = [0]."
    )


def chosen(entries: list[Entry], only: Sequence[str] | None) -> list[Entry]:
    """The entries of the names in `only`, by default all; UserError for an unknown name."""
    names = [entry.name for entry in entries]
    for name in only or ():
        if name not in names:
            raise unknown("entry", name, names)
    return [entry for entry in entries if not only or entry.name in only]
