"""Options from four places, and presets by card.

Defaults < run.toml < `--loss NAME` < `--tier NAME` < `--set loss.beta=500` and flags like --seed:
what stands on the command line is over what a file says.
"""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import tomli_w
from pydantic import BaseModel, ValidationError

from dpo_video import registry
from dpo_video.errors import UserError, unknown
from dpo_video.estimation.tiers import Tier, find_tier
from dpo_video.settings import (
    LARGEST_RANK,
    BuildSettings,
    EvaluateSettings,
    MemorySettings,
    RunSettings,
    TrainSettings,
)
from dpo_video.strategies import (
    Backbone,
    Labeler,
    LabelerFactory,
    Loss,
    Metric,
    PairBuilder,
    Reference,
    StoreLabeler,
)

Model = TypeVar("Model", bound=BaseModel)
Tables = dict[str, dict[str, Any]]

DEFAULTS: Mapping[str, str] = {
    "backbone": "tiny",
    "pairs": "local",
    "loss": "region",
    "reference": "toggle",
}
METRICS = ("warp_error", "frame_difference", "dynamic_degree")
ENGINES: Mapping[str, type[BaseModel]] = {
    "run": RunSettings,
    "build": BuildSettings,
    "train": TrainSettings,
    "memory": MemorySettings,
    "evaluate": EvaluateSettings,
}
_MODEL = "backbone.model"
_PACKAGES = ("dpo-video", "torch", "diffusers", "peft", "transformers", "accelerate", "kornia")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run, fully resolved."""

    run: RunSettings
    build: BuildSettings
    train: TrainSettings
    memory: MemorySettings
    evaluate: EvaluateSettings
    backbone: Backbone
    pairs: PairBuilder | str
    """A strategy, or the folder or URL of pairs built earlier."""
    labeler: Labeler | StoreLabeler | None
    loss: Loss
    reference: Reference
    metrics: Mapping[str, Metric]
    tables: Tables
    """All of the above as plain tables, defaults filled in."""

    def toml(self) -> str:
        """The text of run.toml; `--config` of it repeats the run."""
        versions = {name: version(name) for name in _PACKAGES}
        return tomli_w.dumps(
            {**self.tables, "versions": {**versions, "python": platform.python_version()}}
        )


def resolve(
    *,
    file: Path | None = None,
    choices: Mapping[str, str | None] | None = None,
    metrics: Sequence[str] = (),
    tier: str | None = None,
    flags: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
) -> Config:
    """Merge the places and make the strategies.

    Args:
        file: a TOML file; [versions] in it is ignored.
        choices: kind to name, as given by `--loss NAME`; None leaves the kind as it is.
        metrics: names given by `--metric`; empty leaves them as they are.
        tier: name of a tier, whose options are put over the file's.
        flags: dotted option path to value, for options with flags of their own.
        assignments: texts such as "loss.beta=500".

    Raises:
        UserError: for an unknown name or option, or a value of the wrong type.
    """
    tables = _read(file) if file else {}
    chosen = {kind: name for kind, name in (choices or {}).items() if name is not None}
    for kind in (*DEFAULTS, "labeler"):
        if kind in chosen:
            _choose(tables, kind, chosen[kind])
        elif kind not in tables and kind in DEFAULTS:
            tables[kind] = {"name": DEFAULTS[kind]}
    backbone_class = registry.load("backbone", _name(tables, "backbone"))
    if metrics or "metric" not in tables:
        guards = cast(type[Backbone], backbone_class).guards
        wanted = metrics or (*METRICS, *guards)
        tables["metric"] = {name: tables.get("metric", {}).get(name, {}) for name in wanted}
    given = [(path, value) for path, value in (flags or {}).items() if value is not None]
    given += [_read_assignment(text) for text in assignments]
    if tier is not None:
        # Which model it is decides what the card does with it, so that goes first.
        model = dict(given).get(_MODEL, tables["backbone"].get("model"))
        if model is None and "model" in backbone_class.model_fields:
            model = backbone_class.model_fields["model"].default
        _apply(find_tier(tier), tables, model if isinstance(model, str) else None)
    for path, value in given:
        _assign(tables, path, value)
    defaults = cast(type[Backbone], backbone_class).training
    tables["train"] = _trained(tables.get("train", {}), defaults)
    return _make(tables)


def _read_assignment(text: str) -> tuple[str, Any]:
    """Option path and value of a text like "loss.beta=500"."""
    path, separator, value = text.partition("=")
    if not separator or "." not in path:
        raise UserError(f"'{text}' is not KIND.OPTION=VALUE. Write it like --set loss.beta=500.")
    return path.strip(), _parse(value.strip())


def _apply(tier: Tier, tables: Tables, model: str | None) -> None:
    """Put a tier's options over those there are; alpha then goes along with its rank."""
    for path, value in tier.preset(_name(tables, "backbone"), model).items():
        _assign(tables, path, value)
    tables["train"].pop("alpha", None)


def _trained(given: Any, defaults: Mapping[str, Any]) -> Any:
    """[train] with what the family trains with, where nothing else is said."""
    if not isinstance(given, Mapping):
        return given
    options = {**defaults, **given}
    rank = options.get("rank")
    if not isinstance(rank, int | float) or not 0 < rank <= LARGEST_RANK:
        return options  # it will be refused
    if "rank" in given and "alpha" not in given:
        # An adapter's update is scaled by alpha / rank: another rank keeps that scale.
        usual = TrainSettings(**defaults)
        options["alpha"] = rank * usual.alpha / usual.rank
    return options


def _read(file: Path) -> Tables:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"Cannot read '{file}': {error.strerror}. Name an existing TOML file."
        ) from error
    except (ValueError, RecursionError) as error:  # numbers too long and tables too deep, too
        raise UserError(
            f"'{file}' is not valid TOML: {error}. Correct it and run again."
        ) from error
    tables.pop("versions", None)
    known = {*ENGINES, *registry.KINDS}
    for name, table in tables.items():
        if name not in known:
            raise unknown("table", name, known)
        if not isinstance(table, dict):
            raise UserError(
                f"'{name}' in '{file}' is not a table. Write [{name}] and its options below."
            )
    return tables


def _choose(tables: Tables, kind: str, name: str) -> None:
    """Options that a file gives belong to the strategy that it names; another one drops them."""
    if kind == "pairs":
        # A folder that happens to be called like a strategy must not take its place.
        strategies = {listing.name for listing in registry.listings("pairs")}
        if "/" in name or (name not in strategies and Path(name, "store.json").exists()):
            tables["pairs"] = {"store": name}
            return
    if tables.get(kind, {}).get("name") != name:
        tables[kind] = {"name": name}


def _name(tables: Tables, kind: str) -> str:
    name = tables[kind].get("name")
    if not isinstance(name, str):
        raise UserError(f"The table [{kind}] names no strategy. Add name = \"...\" to it "
                        f"(see `dpo-video list {kind}`).")  # fmt: skip
    return name


def _assign(tables: Tables, path: str, value: Any) -> None:
    for text in (path, value):
        if isinstance(text, str) and not _encodes(text):
            raise UserError(f"'{path}' = {text!r} is not UTF-8. Type it again.")
    head, *middle, last = path.split(".")
    known = {*ENGINES, *registry.KINDS}
    if head not in known:
        raise unknown("table", head, known)
    if head == "labeler" and head not in tables:
        raise UserError(
            f"'{path}' sets an option of a labeler, but none is chosen. Add --labeler NAME."
        )
    if head in registry.KINDS and not middle and last == "name":
        raise UserError(f"'{path}' is no option. Choose a {head} by --{head} NAME.")
    node = tables.setdefault(head, {})
    if head == "metric" and middle and middle[0] not in node:
        raise unknown("metric among those chosen", middle[0], node)
    for part in middle:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(
                f"'{path}' goes through '{part}', which is not a table. Check the path."
            )
    node[last] = value


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text  # a bare word


def _encodes(text: str) -> bool:
    """Whether a run.toml can hold it: bytes of a command line that are not UTF-8 it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _make(tables: Tables) -> Config:
    engines = {name: _build(model, tables.get(name, {}), name) for name, model in ENGINES.items()}
    made: dict[str, Any] = {}
    for kind in ("backbone", "pairs", "labeler", "loss", "reference"):
        if kind not in tables:
            made[kind] = None
        elif kind == "pairs" and "store" in tables["pairs"]:
            made["pairs"] = _store(tables["pairs"])
        else:
            options = {key: value for key, value in tables[kind].items() if key != "name"}
            name = _name(tables, kind)
            made[kind] = _build(registry.load(kind, name), options, kind, name)
    settled = made["labeler"]
    if isinstance(settled, LabelerFactory):
        settled, made["labeler"] = _give_metrics(settled)
    metrics = {
        name: cast(Metric, _build(registry.load("metric", name), table, f"metric.{name}", name))
        for name, table in tables["metric"].items()
    }
    resolved: Tables = {name: _dump(model) for name, model in engines.items()}
    for kind, strategy in {**made, "labeler": settled}.items():
        if isinstance(strategy, str):
            resolved[kind] = {"store": strategy}
        elif strategy is not None:
            resolved[kind] = {"name": tables[kind]["name"], **_dump(strategy)}
    resolved["metric"] = {name: _dump(metric) for name, metric in metrics.items()}
    return Config(**engines, **made, metrics=metrics, tables=resolved)  # type: ignore[arg-type]


def _give_metrics(labeler: LabelerFactory) -> tuple[LabelerFactory, Labeler]:
    """The labeler with its metrics' options spelled out, and the one that judges by them."""
    if strays := sorted(labeler.options.keys() - set(labeler.metric_names)):
        raise unknown("metric among the labeler's", strays[0], labeler.metric_names)
    metrics = {}
    for name in labeler.metric_names:
        options = labeler.options.get(name, {})
        made = _build(registry.load("metric", name), options, f"metric.{name}", name)
        metrics[name] = cast(Metric, made)
    options = {name: _dump(metric) for name, metric in metrics.items()}
    settled = labeler.model_copy(update={"options": options})
    return settled, settled.with_metrics(metrics)


def _store(table: Mapping[str, Any]) -> str:
    if not isinstance(table["store"], str):
        raise UserError(f"pairs.store = {table['store']!r} is no folder. Write its path in quotes.")
    if extra := sorted(table.keys() - {"store"}):
        raise UserError(
            f"pairs.{extra[0]} is an option of a strategy, but pairs.store names finished pairs, "
            f"'{table['store']}'. Remove one of the two."
        )
    return table["store"] if "://" in table["store"] else str(Path(table["store"]))


def _build(model: type[Model], options: Any, path: str, name: str = "") -> Model:
    if not isinstance(options, Mapping):
        raise UserError(f"'{path}' is {options!r}, not a table. Set its options, one by one.")
    try:
        return model(**options)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join([path, *(str(part) for part in detail["loc"])])
        kind = path.split(".")[0]
        see = f"`dpo-video show {kind} {name}`" if name else f"`dpo-video show {path}`"
        if detail["type"] == "extra_forbidden":
            paths = [option.path for option in registry.options(model, path)]
            raise unknown("option", where, paths) from error
        hidden = model.model_config.get("hide_input_in_errors") or detail["type"] == "missing"
        # What several options together do wrong has no place of its own.
        what = where if hidden or not detail["loc"] else f"{where} = {detail['input']!r}"
        reason = detail["msg"].removeprefix("Value error, ")
        raise UserError(f"{what}: {reason}. See {see}.") from error


def _dump(model: BaseModel) -> dict[str, Any]:
    """Plain values, without the ones that are not set: TOML has no null."""
    plain = model.model_dump(mode="json", exclude_none=True)
    try:
        tomli_w.dumps(plain)
    except (TypeError, ValueError) as error:  # a stranger's options
        raise UserError(
            f"The options of {type(model).__name__} of {type(model).__module__} cannot be written "
            f"down in a run.toml ({error}). Its author must use plain types."
        ) from error
    return plain
