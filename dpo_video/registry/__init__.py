"""Strategies by name, built-in ones and plugins', from entry points of the group `dpo_video.KIND`.

Listing names imports no strategy.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from dpo_video.errors import PluginError, UserError, unknown
from dpo_video.registry import local
from dpo_video.registry.entry_points import Entry, entries

if TYPE_CHECKING:
    from dpo_video.strategies import Strategy

# Keys with a fixed meaning in the tables of run.toml.
_RESERVED = {"name": "the strategy's name", "store": "a folder of finished pairs"}
_SESSION: dict[tuple[str, str], type[Strategy]] = {}
_TERM = re.compile(r"(?:(?P<weight>\d+(?:\.\d+)?(?:e-?\d+)?)\*)?(?P<name>[A-Za-z_][\w:-]*)")
KINDS = (
    "pairs", "labeler", "loss", "reference", "timesteps", "optimizer", "schedule", "listener",
    "metric", "backbone", "check", "format",
)  # fmt: skip

PYTHON = (*KINDS, "command")
"""Kinds that are Python objects: strategies, and commands, which are functions."""
FILES = ("recipe", "tier", "model")
"""Kinds of files: an entry point names the package that holds them."""
SEVERAL = ("listener", "metric", "check")
"""The kinds of which a run has any number, each with a table [KIND.NAME]."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """An installed strategy, described without importing it."""

    kind: str
    name: str
    distribution: str
    summary: str
    note: str = ""
    """Why the name does not choose it, and what does; or that it is broken."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a strategy or of a table such as [train]."""

    path: str
    type: str
    default: str
    meaning: str


def listings(kind: str) -> list[Listing]:
    """The installed strategies of a kind, sorted by name."""
    return [
        Listing(
            kind=kind,
            name=name,
            distribution=entry.distribution,
            summary=summary_of(entry),
            note=_note(entry, same),
        )
        for name, same in sorted(named(check_kind(kind, PYTHON)).items())
        for entry in same
    ]


def unknown_groups() -> list[str]:
    """One sentence for each package with entry points of a group that is none."""
    kinds = [*PYTHON, *FILES]
    found: dict[tuple[str, str], str] = {}
    for entry in entries():
        if entry.kind not in kinds:
            near = difflib.get_close_matches(entry.kind, kinds, n=1)
            meant = f" Did its author mean dpo_video.{near[0]}?" if near else ""
            found[entry.distribution, entry.kind] = (
                f"{entry.distribution} has entry points of the group 'dpo_video.{entry.kind}', "
                f"which does not exist.{meant}"
            )
    return list(found.values())


def is_store(name: str) -> bool:
    """Whether a text names finished pairs: a path with a slash, a URL, or a store's folder.

    A folder that has the name of a strategy does not hide the strategy.
    """
    if local.is_file(name):
        return False
    return "/" in name or (name not in named("pairs") and Path(name, "store.json").exists())


def load(kind: str, name: str) -> type[Strategy]:
    """The class of a name.

    Raises:
        UserError: for an unknown kind or name.
        PluginError: for a name that several packages use, or a plugin that is broken.

    A built-in strategy hides a plugin's of the same name; `package:name` chooses that one. The name
    of a loss may be a sum, such as `global+0.1*sft`.
    """
    if local.is_file(name):
        loaded = local.load(name)
        called = getattr(loaded, "__name__", name)
        entry = Entry(kind=kind, name=called, value="", distribution=name)
        if fault := _fault(loaded, check_kind(kind), entry):
            raise PluginError(f"The {kind} '{name}' {fault}")
        return loaded
    if kind == "loss" and _is_sum(name):
        from dpo_video.registry.sums import sum_of

        return sum_of(name)
    if name not in named(check_kind(kind)) and (kind, name) in _SESSION:
        return _SESSION[kind, name]
    entry = find(kind, name)
    loaded = imported(entry)
    if fault := _fault(loaded, kind, entry):
        raise PluginError(f"The {kind} '{name}' of {entry.distribution} {fault}")
    strategy: type[Strategy] = loaded
    return strategy


def imported(entry: Entry) -> Any:
    """What an entry point names.

    Raises:
        PluginError: if it cannot be imported.
    """
    try:
        return entry.load()
    except (Exception, SystemExit) as error:  # a plugin's import may do anything
        reason = "" if isinstance(error, PluginError) else f"{type(error).__name__}: "
        raise PluginError(
            f"The {entry.kind} '{entry.name}' of {entry.distribution} cannot be imported "
            f"({reason}{error}). Repair or uninstall that package; all other "
            "strategies still work."
        ) from error


def terms(name: str) -> dict[str, float]:
    """The weights by loss of a name such as `global+0.1*sft`; 1 for the name of one loss.

    Raises:
        UserError: for a name that is no sum of different losses.
    """
    found = [_TERM.fullmatch(part.strip()) for part in name.split("+")]
    weights = {term["name"]: float(term["weight"] or 1) for term in found if term}
    if ".py:" in name:
        raise UserError(
            f"'{name}': a loss in a file cannot be part of a sum. Let its class add the other "
            "loss, or make a package of it: dpo-video new loss NAME"
        )
    if len(weights) < len(found) or not all(weights.values()):
        raise UserError(
            f"'{name}' is no sum of losses. Write each loss once, with a weight above 0: "
            "--loss global+0.1*sft"
        )
    return weights


def _is_sum(name: str) -> bool:
    return "+" in name or "*" in name


def short_name(name: str) -> str:
    """A name for folders: of a class in a file that of the class, without signs."""
    name = name.rpartition(":")[2] if local.is_file(name) else name
    return name.replace("*", "x").replace(":", "-")


def check_name(kind: str, name: str) -> None:
    """Refuse a name that `load` would not know; nothing is imported.

    Raises:
        UserError: for an unknown name.
    """
    if local.is_file(name):
        return
    for part in terms(name) if kind == "loss" and _is_sum(name) else [name]:
        find(kind, part)


def strategy(kind: str, name: str, **options: Any) -> Any:
    """A strategy by its name, a plugin's included: `strategy("loss", "region", beta=2500)`.

    Raises:
        UserError: for an unknown kind or name.
        ValidationError: for a wrong option.
    """
    return load(kind, name)(**options)


def name_of(strategy: Strategy) -> str:
    """The name that a strategy's class is registered under.

    A class without an entry point, such as one defined in a notebook, is registered under its own
    name for this session only: no other process can repeat or evaluate its runs.
    """
    cls = type(strategy)
    if (name := getattr(cls, "registered_name", None)) is not None:  # a sum of losses
        return str(name)
    for entry in entries():
        if (entry.kind, entry.attr) == (strategy.kind, cls.__qualname__) and (
            entry.module == cls.__module__ or entry.load() is cls
        ):
            return (
                entry.name if _chosen(named(entry.kind)[entry.name]) == [entry] else entry.qualified
            )
    _SESSION[strategy.kind, cls.__name__] = cls
    return cls.__name__


def options(model: type[Any], path: str) -> list[Option]:
    """The options of a pydantic class; nested ones have a dotted path."""
    found = []
    for name, field in model.model_fields.items():
        here = f"{path}.{name}"
        nested = field.annotation
        if isinstance(nested, type) and hasattr(nested, "model_fields"):
            found += options(nested, here)
            continue
        value = field.get_default(call_default_factory=True, validated_data={})
        default = "required" if field.is_required() else repr(value)
        meaning = " ".join((field.description or "").split())
        found.append(Option(path=here, type=_type(nested), default=default, meaning=meaning))
    return found


def check_kind(kind: str, kinds: Sequence[str] = KINDS) -> str:
    """Return a kind's name; a UserError for an unknown one."""
    if kind not in kinds:
        raise unknown("kind", kind, kinds)
    return kind


def find(kind: str, name: str) -> Entry:
    """The entry point of a name.

    Raises:
        UserError: for an unknown name.
        PluginError: for a name that several plugins use and no built-in strategy.
    """
    if ":" in name:
        qualified = {each.qualified: each for each in entries() if each.kind == kind}
        package, _, last = name.partition(":")
        wanted = f"{re.sub(r'[-_.]+', '-', package).lower()}:{last}"
        if wanted not in qualified:
            raise unknown(kind, name, qualified)
        return qualified[wanted]
    found = named(kind)
    if name.endswith(".py"):
        raise UserError(f"'{name}' is a file. Name the class in it, too: --{kind} {name}:CLASS")
    if name not in found:
        raise unknown(kind, name, found)
    same = found[name]
    chosen = _chosen(same)
    if len(chosen) > 1:
        raise PluginError(
            f"Several packages provide a {kind} '{name}': "
            f"{', '.join(each.distribution for each in same)}. Name the package as well: "
            f"{' or '.join(each.qualified for each in same)}."
        )
    return chosen[0]


def _chosen(same: list[Entry]) -> list[Entry]:
    """Those of several entry points of one name that the plain name can mean."""
    return [each for each in same if each.built_in] or same


def is_installed(kind: str, name: str) -> bool:
    """Whether a name, plain or as `package:name`, is one of a strategy; nothing is imported."""
    return (kind, name) in _SESSION or any(
        name in (entry.name, entry.qualified) for entry in entries() if entry.kind == kind
    )


def named(kind: str) -> dict[str, list[Entry]]:
    """Entry points by name; a name has several if packages provide different objects for it."""
    found: dict[str, list[Entry]] = {}
    for entry in entries():
        if entry.kind == kind:
            same = found.setdefault(entry.name, [])
            if entry.value not in {other.value for other in same}:
                same.append(entry)
    return found


def note(entry: Entry) -> str:
    """Why the plain name of an entry point does not choose it; "" if it does."""
    return _note(entry, named(entry.kind)[entry.name])


def _note(entry: Entry, same: list[Entry]) -> str:
    """What a list says of an entry point whose plain name does not choose it."""
    if not entry.can_be_typed:
        return "broken: its name has other characters than letters, digits, _ and -"
    if entry.built_in or len(same) == 1:
        return ""
    if any(each.built_in for each in same):
        return f"hidden by the built-in; choose it as {entry.qualified}"
    return f"same name as another package's; choose it as {entry.qualified}"


def _fault(loaded: Any, kind: str, entry: Entry) -> str:
    """The fault of a class that shows without running it; "" if there is none."""
    bases = _bases(kind)
    base = next((b for b in bases if isinstance(loaded, type) and issubclass(loaded, b)), None)
    if base is None:
        names = " or ".join(each.__name__ for each in bases)
        return f"is not a {names}. Derive it from {bases[0].__module__}.{bases[0].__name__}."
    if not entry.can_be_typed:
        return "has an invalid name. Names consist of letters, digits, _ and -."
    if inspect.isabstract(loaded):
        missing = ", ".join(sorted(loaded.__abstractmethods__))
        return f"is incomplete: it lacks {missing}. See {base.__module__}.{base.__name__}."
    if silent := sorted(name for name in loaded.__class_vars__ if not hasattr(loaded, name)):
        return f"does not set {silent[0]}. See {base.__module__}.{base.__name__}."
    if not (loaded.model_config.get("frozen") and loaded.model_config.get("extra") == "forbid"):
        return (
            "is not frozen, or accepts unknown options, so its runs could not be repeated. Do not "
            "override model_config."
        )
    secrets = {*loaded.secrets, *loaded.secrets.values()}
    if strays := sorted(secrets - loaded.model_fields.keys()):
        return f"lists '{strays[0]}' in its secrets, which is none of its options."
    if kind == "metric" and loaded.role not in ("target", "motion", "guard"):
        return f"has the role {loaded.role!r}. Roles are target, motion and guard."
    if "kind" in loaded.model_fields:
        return "has an option 'kind', which is the kind of a strategy. Remove it."
    reserved = {"name", "store"} if kind == "pairs" else {"name"}
    if clash := sorted(reserved & loaded.model_fields.keys()):
        return (
            f"has an option '{clash[0]}', which means {_RESERVED[clash[0]]} in a run.toml. Rename "
            "it."
        )
    return ""


def summary_of(entry: Entry) -> str:
    """First line of a strategy's docstring, read from its source without importing it.

    "" if that cannot be read.
    """
    top, *rest = entry.module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # that of a module in it would import the package
        origin = Path(str(spec.origin if spec else ""))
        path = origin.parent.joinpath(*rest)
        files = [path / "__init__.py", path.with_suffix(".py")] if rest else [origin]
        source = next(file.read_text(encoding="utf-8") for file in files if file.is_file())
        tree = ast.parse(source)
    except (ImportError, OSError, ValueError, SyntaxError, StopIteration):
        return ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == entry.attr:
            return (ast.get_docstring(node) or "").split("\n")[0]
    return ""


def _bases(kind: str) -> tuple[type[Strategy], ...]:
    """The abstract classes of a kind; a strategy derives from one of them."""
    from dpo_video import extensions, strategies

    bases: dict[str, tuple[type[Strategy], ...]] = {
        "pairs": (strategies.PairBuilder,),
        "labeler": (strategies.Labeler, strategies.LabelerFactory, strategies.StoreLabeler),
        "loss": (strategies.Loss,),
        "reference": (strategies.Reference,),
        "timesteps": (extensions.TimestepSampler,),
        "optimizer": (extensions.Optimizer,),
        "schedule": (extensions.Schedule,),
        "listener": (extensions.ListenerFactory,),
        "check": (extensions.PairCheck,),
        "format": (extensions.AdapterFormat, extensions.MergedFormat),
        "metric": (strategies.Metric,),
        "backbone": (strategies.Backbone,),
    }
    return bases[kind]


def _type(annotation: Any) -> str:
    """A type as in a signature; a Literal as its values, without pydantic's constraints."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is NoneType:
        return "None"
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_type, arguments))
    name = getattr(origin or annotation, "__name__", str(annotation))
    inner = ("..." if each is Ellipsis else _type(each) for each in arguments)
    return f"{name}[{', '.join(inner)}]" if arguments else name
