"""The plain tables of a configuration: read from a file, changed by names and single options."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dpo_video import registry
from dpo_video.errors import UserError, unknown
from dpo_video.registry import local
from dpo_video.settings import (
    BuildSettings,
    EvaluateSettings,
    MemorySettings,
    RunSettings,
    TrainSettings,
)
from dpo_video.strategies import Strategy
from dpo_video.support.reading import read_toml
from dpo_video.workflows.presets import Tables

DEFAULTS: Mapping[str, str] = {
    "backbone": "tiny",
    "pairs": "local",
    "loss": "region",
    "reference": "toggle",
    "timesteps": "family",
    "optimizer": "adamw",
    "schedule": "linear",
}
ENGINES: Mapping[str, type[BaseModel]] = {
    "run": RunSettings,
    "build": BuildSettings,
    "train": TrainSettings,
    "memory": MemorySettings,
    "evaluate": EvaluateSettings,
}
TABLES = frozenset({*ENGINES, *registry.KINDS})
CHOSEN = frozenset({*DEFAULTS, "labeler", "format"})
CHANGES = "changes"
"""Array in a run.toml: the options that were changed when the run was resumed."""


def read_tables(file: Path) -> Tables:
    """The tables of a TOML file, without what is in a run.toml for the record only.

    Raises:
        UserError: if it cannot be read, or holds anything but the tables of a configuration.
    """
    try:
        tables = read_toml(file)
    except OSError as error:
        raise UserError(
            f"Cannot read '{file}': {error.strerror}. Name an existing TOML file."
        ) from error
    except ValueError as error:
        raise UserError(
            f"'{file}' is not valid TOML: {error}. Correct it and run again."
        ) from error
    for record in ("versions", CHANGES):
        tables.pop(record, None)
    for name, table in tables.items():
        if name not in TABLES:
            raise unknown("table", name, TABLES)
        if not isinstance(table, dict):
            raise UserError(
                f"'{name}' in '{file}' is not a table. Write [{name}] above its options."
            )
    return tables


def seen_from(table: Mapping[str, Any], folder: Path, allow_code: bool) -> dict[str, Any]:
    """A table of a file in `folder`, with the paths of classes in files seen from there."""
    found = {local.below(folder, n) if local.is_file(n) else n: each for n, each in table.items()}
    for name in found if allow_code else ():
        if local.is_file(name):
            local.allow(name)
    return found


def choose(tables: Tables, kind: str, name: str) -> None:
    """Choose a strategy by name; the file's options stay only if the file names the same one."""
    if kind == "pairs" and registry.is_store(name):
        tables["pairs"] = {"store": name}
    elif local.same(str(tables.get(kind, {}).get("name")), name):
        tables[kind]["name"] = name
    else:
        tables[kind] = {"name": name}


def choose_several(
    tables: Tables, kind: str, given: Sequence[Strategy | str], usual: Sequence[str]
) -> None:
    """Choose strategies of a kind; those like `+NAME` are added to the file's, or to the usual."""
    before = tables.get(kind, {})
    added = [each[1:] for each in given if isinstance(each, str) and each.startswith("+")]
    plain = [each for each in given if not (isinstance(each, str) and each.startswith("+"))]
    tables[kind] = {}
    for each in [*(plain or list(before) or usual), *added]:
        if isinstance(each, Strategy):
            tables[kind][registry.name_of(each)] = set_by_hand(each)
            continue
        found = next(
            (name for name in (each, *before) if name in before and local.same(name, each)), ""
        )
        tables[kind].pop(found, None)  # the same class, named again
        tables[kind][each] = before.get(found, {})


def name_in(tables: Tables, kind: str) -> str:
    """The name of the strategy that a table chooses.

    Raises:
        UserError: if it names none.
    """
    name = tables[kind].get("name")
    if not isinstance(name, str):
        raise UserError(
            f'The table [{kind}] names no strategy. Add name = "..." to it (see `dpo-video list '
            f"{kind}`)."
        )
    return name


def table_of(recipe: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """A table of the recipe of pairs, which may be anybody's; empty if it has none."""
    table = (recipe or {}).get(name)
    return dict(table) if isinstance(table, Mapping) else {}


def read_assignment(text: str) -> tuple[str, Any]:
    """Option path and value of a text like "loss.beta=500"."""
    path, separator, value = text.partition("=")
    if not separator or "." not in path:
        raise UserError(f"'{text}' is not KIND.OPTION=VALUE. Write it like --set loss.beta=500.")
    return path.strip(), parse(value.strip())


def assign(tables: Tables, path: str, value: Any) -> None:
    """Set one option.

    Raises:
        UserError: if the path leads to no table, or the text is not valid UTF-8.
    """
    for text in (path, value):
        if isinstance(text, str) and not _encodes(text):
            raise UserError(f"'{path}' = {text!r} is not valid UTF-8. Type it again.")
    head, *middle, last = path.split(".")
    if head not in TABLES:
        raise unknown("table", head, TABLES)
    if head in ("labeler", "format") and head not in tables:
        raise UserError(
            f"'{path}' sets an option of a {head}, but none is chosen. Add --{head} NAME."
        )
    if head in registry.KINDS and not middle and last == "name":
        raise UserError(f"'{path}' is not an option. Choose a {head} with --{head} NAME.")
    node = tables.setdefault(head, {})
    if head in registry.SEVERAL and middle:
        short = {registry.short_name(name): name for name in node}  # of a class in a file
        if middle[0] not in node and middle[0] not in short:
            if registry.is_installed(head, middle[0]):
                plus = "" if not node else "+"
                raise UserError(
                    f"'{path}' sets an option of the {head} '{middle[0]}', which this run does not "
                    f"use. Add --{head} {plus}{middle[0]}."
                )
            raise unknown(f"{head} of this run", middle[0], node)
        middle[0] = short.get(middle[0], middle[0])
    for part in middle:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"'{part}' in '{path}' is not a table. Check the path.")
    node[last] = value


def keep_secrets(
    tables: Tables, given: Collection[str], file: Path | None, kinds: Collection[str]
) -> None:
    """Refuse secrets that a file names; what it names the receiver of gets none by default."""
    places = [(kind, tables[kind].get("name"), tables[kind]) for kind in tables.keys() & CHOSEN]
    for several in registry.SEVERAL:
        places += [(f"{several}.{n}", n, each) for n, each in tables.get(several, {}).items()]
    for path, name, table in places:
        kind = path.partition(".")[0]
        if kind not in kinds or not isinstance(name, str) or not isinstance(table, Mapping):
            continue  # not made, or refused later
        cls = registry.load(kind, name)
        for secret, receiver in cls.secrets.items():
            if table.get(secret):
                raise UserError(
                    f"'{path}.{secret}' in '{file or 'an entry'}' names a secret, which a file "
                    f"cannot do. Remove it there, and give it as --set {path}.{secret}=NAME."
                )
            default = cls.model_fields[receiver].default
            if table.get(receiver, default) != default and f"{path}.{secret}" not in given:
                table[secret] = ""


def set_by_hand(strategy: Strategy) -> dict[str, Any]:
    """The options that were given to a strategy; the others keep their defaults."""
    return strategy.model_dump(mode="json", exclude_unset=True)


def parse(text: str) -> Any:
    """The value of a text as in TOML; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text  # a bare word


def _encodes(text: str) -> bool:
    """Whether a text is valid UTF-8, as a run.toml must be; a command line's bytes may not be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
