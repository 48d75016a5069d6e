"""The configuration of a run, merged from defaults, a recipe, a tier, a file and single options.

Precedence, lowest first: defaults, the backbone's, a launcher's, a recipe, a tier's presets, a TOML
file, strategies by name, and single options (`--set loss.beta=500`, and flags such as --seed).
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import tomli_w
from pydantic import BaseModel, ValidationError

from dpo_video import registry
from dpo_video.data.audit import CHECKS
from dpo_video.errors import UserError, fault_reason, unknown
from dpo_video.extensions import (
    ExportFormat,
    ListenerFactory,
    Optimizer,
    PairCheck,
    Schedule,
    TimestepSampler,
)
from dpo_video.paths import absolute
from dpo_video.registry import local
from dpo_video.registry.attribution import made_by
from dpo_video.settings import (
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
    Strategy,
)
from dpo_video.support.reading import read_toml
from dpo_video.support.urls import folder_of, is_url, without_credentials
from dpo_video.workflows.presets import Presets, Tables
from dpo_video.workflows.recipes import find_recipe, recipe_for
from dpo_video.workflows.tables import (
    CHANGES,
    CHOSEN,
    DEFAULTS,
    ENGINES,
    TABLES,
    assign,
    choose,
    choose_several,
    keep_secrets,
    name_in,
    read_assignment,
    read_tables,
    seen_from,
    set_by_hand,
    table_of,
)

Model = TypeVar("Model", bound=BaseModel)
P = ParamSpec("P")

TRAINED_BY = ("loss", "reference", "timesteps", "optimizer", "schedule")
"""The kinds whose strategies a training uses besides its pairs and its backbone."""
METRICS = ("warp_error", "frame_difference", "dynamic_degree")
_MODEL, _DESCRIBED_BY = "backbone.model", "backbone.config"
_PACKAGES = ("dpo-video", "torch", "diffusers", "peft", "transformers", "accelerate", "kornia")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A fully resolved run."""

    run: RunSettings
    build: BuildSettings
    train: TrainSettings
    memory: MemorySettings
    evaluate: EvaluateSettings
    backbone: Backbone
    pairs: PairBuilder | None
    """How pairs are built; None where `pair_store` names finished pairs."""
    pair_store: str | None
    """The folder or URL of finished pairs; None where `pairs` builds them."""
    labeler: Labeler | StoreLabeler | None
    format: ExportFormat | None
    """Of an export."""
    trained_by: Mapping[str, Strategy]
    """The strategies of the training by kind, as far as they were asked for: see `kinds` of
    `resolve`."""
    metrics: Mapping[str, Metric]
    listeners: Mapping[str, ListenerFactory]
    checks: Mapping[str, PairCheck]
    tables: Tables
    """All of the above as plain tables, defaults included."""
    notes: tuple[str, ...] = ()
    """What a user should know about how they were merged, a sentence each."""
    presets: tuple[str, ...] = ()
    """The flags that named a recipe and a tier, for the record only."""

    @property
    def loss(self) -> Loss:
        """The loss of the training."""
        return cast(Loss, self.trained_by["loss"])

    @property
    def reference(self) -> Reference:
        """The reference of the training."""
        return cast(Reference, self.trained_by["reference"])

    @property
    def timesteps(self) -> TimestepSampler:
        """What draws the training's timesteps."""
        return cast(TimestepSampler, self.trained_by["timesteps"])

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the training."""
        return cast(Optimizer, self.trained_by["optimizer"])

    @property
    def schedule(self) -> Schedule:
        """The learning-rate schedule of the training."""
        return cast(Schedule, self.trained_by["schedule"])

    def versions(self) -> dict[str, str]:
        """The installed version of each main package, and of those whose strategies are used."""
        own = {name: version(name) for name in _PACKAGES}
        return {**own, **self.plugin_versions(), "python": platform.python_version()}

    def plugin_versions(self) -> dict[str, str]:
        """Version and hash of the code of each package whose strategies are used."""
        used = [self.backbone, self.pairs, self.labeler, *self.trained_by.values()]
        if "loss" in self.trained_by:
            used += getattr(self.loss, "terms", {}).values()  # of a sum
        return dict(
            filter(None, map(made_by, [*used, *self.metrics.values(), *self.listeners.values()]))
        )

    def toml(self, changes: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text of run.toml; `--config` with it repeats the run.

        Args:
            changes: Options that were changed when the run was resumed, for the record only.
        """
        record = {CHANGES: list(changes)} if changes else {}
        heading = f"# resolved with {' '.join(self.presets)}\n\n" if self.presets else ""
        text = tomli_w.dumps({**self.tables, "versions": self.versions(), **record})
        return heading + text


def _names_its_file(resolve: Callable[P, Config]) -> Callable[P, Config]:
    """Add the file's name to an error that the file causes alone, without other options."""

    @wraps(resolve)
    def call(*args: P.args, **options: P.kwargs) -> Config:
        try:
            return resolve(*args, **options)
        except UserError as error:
            file = options.get("file")
            if file is None or type(error) is not UserError or str(file) in str(error):
                raise
            kept = {name: options[name] for name in ("file", "kinds") if name in options}
            try:
                resolve(*args, **kept)  # type: ignore[arg-type]
            except UserError as alone:
                if str(alone) == str(error):
                    text = f"'{file}': {error}{_missing_packages(Path(str(file)))}"
                    raise UserError(text) from error
            raise

    return call


def _missing_packages(file: Path) -> str:
    """A sentence that names the packages that a run.toml was written with and that are missing."""
    versions = read_toml(file).get("versions")
    missing = []
    for name, written in versions.items() if isinstance(versions, Mapping) else ():
        try:
            version(name)
        except PackageNotFoundError:
            if "source" in str(written) and not name.endswith(".py"):  # of a plugin
                missing.append(f"{name} {written}")
    if not missing:
        return ""
    these = "it" if len(missing) == 1 else "them"
    return f" The file was written with {', '.join(missing)}: install {these}."


@_names_its_file
def resolve(
    *,
    recipe: str | None = None,
    file: Path | None = None,
    choices: Mapping[str, Any] | None = None,
    metrics: Sequence[Metric | str] = (),
    listeners: Sequence[ListenerFactory | str] = (),
    checks: Sequence[PairCheck | str] | None = None,
    tier: str | None = None,
    flags: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    made_with: Mapping[str, Any] | None = None,
    launched: Mapping[str, Any] | None = None,
    shared: Sequence[str] = (),
    kinds: Collection[str] = registry.KINDS,
    allow_code: bool = False,
) -> Config:
    """Merge the sources of options and make the strategies.

    Args:
        recipe: Name of a recipe. Its options of a strategy hold if that strategy is chosen.
        file: A TOML file; its [versions] and [[changes]] are ignored.
        choices: Kind to a strategy or its name, as `--loss NAME` gives it; None changes nothing.
        metrics: Metrics or their names, as `--metric` gives them; none changes nothing, and names
            like `+NAME` are added to the others.
        listeners: The same of listeners.
        checks: The same of checks of pairs; None where no pairs are checked.
        tier: Name of a tier. Its options override a recipe's, and are overridden by the file's. It
            lowers a recipe's numbers and raises none.
        flags: Option path to value, for options with flags of their own.
        assignments: Texts such as "loss.beta=500".
        made_with: The recipe of finished pairs. Their backbone is taken unless another one is
            named; its options and precision, unless the file or another option sets them.
        launched: Options by path that a launcher asks for. They override defaults only.
        shared: The same from a file, such as an entry's: they do not set secrets.
        kinds: The kinds of strategies that are needed. The others are neither made nor looked for,
            so that a run can be evaluated without the plugin of its loss; their tables are kept.
        allow_code: Run the Python files that `file` names as strategies.

    Raises:
        UserError: for an unknown name or option, or a value of the wrong type.
    """
    tables = read_tables(file) if file else {}
    for each in tables.values():
        if file and isinstance(named := each.get("name"), str) and local.is_file(named):
            each["name"] = local.below(file.parent, named)
            if allow_code:
                local.allow(each["name"])
    for kind in registry.SEVERAL:
        if file and kind in tables:
            tables[kind] = seen_from(tables[kind], file.parent, allow_code)
    base = find_recipe(recipe) if recipe else None
    names = {**DEFAULTS, **(base.strategies if base else {})}
    names["backbone"] = table_of(made_with, "backbone").get("name", names["backbone"])
    given: list[tuple[str, Any]] = []
    chosen = {kind: choice for kind, choice in (choices or {}).items() if choice is not None}
    for kind in (*DEFAULTS, "labeler", "format"):
        choice = chosen.get(kind)
        if isinstance(choice, Strategy):
            tables[kind] = {"name": registry.name_of(choice)}
            given += [(f"{kind}.{name}", value) for name, value in set_by_hand(choice).items()]
        elif isinstance(choice, type):
            raise UserError(
                f"{kind}={choice.__name__} is a class. Pass an object of it: {choice.__name__}()"
            )
        elif choice is not None:
            choose(tables, kind, str(choice))
        elif kind not in tables and kind in names:
            tables[kind] = {"name": names[kind]}
    backbone = name_in(tables, "backbone")
    made = _made_with(made_with or {}, local.recorded(backbone))
    for path, value in made.items():
        table, option = path.split(".", 1)
        tables.setdefault(table, {}).setdefault(option, value)
    backbone_class = registry.load("backbone", backbone)
    absent: dict[str, str] = {}
    if metrics or "metric" not in tables:
        guards = cast(type[Backbone], backbone_class).guards
        choose_several(tables, "metric", metrics, [*METRICS, *guards])
    elif not set(registry.KINDS) <= set(kinds):
        absent = {n: reason for n in tables["metric"] if (reason := _why_absent(n))}
        effects = tables.get("evaluate", {}).get("min_effects")
        for missing in absent:
            del tables["metric"][missing]
            if isinstance(effects, dict):
                effects.pop(missing, None)
    if listeners:
        choose_several(tables, "listener", listeners, [])
    if checks is not None:
        choose_several(tables, "check", checks, CHECKS)
    for text in shared:
        assign(tables, *read_assignment(text))
    given += [(path, value) for path, value in (flags or {}).items() if value is not None]
    given += [read_assignment(text) for text in assignments]
    # Recipes and tiers depend on the model, so the model is determined first.
    named = {
        **{f"backbone.{key}": value for key, value in tables["backbone"].items()},
        **dict(given),
    }
    model = named.get(_DESCRIBED_BY, named.get(_MODEL))  # a single file has no name
    if model is None and "model" in backbone_class.model_fields:
        model = backbone_class.model_fields["model"].default
    presets = Presets.of(
        base,
        tier,
        {kind: table.get("name") for kind, table in tables.items()},
        model if isinstance(model, str) else None,
        cast(type[Backbone], backbone_class).tiers,
    )
    notes = [] if file is None else presets.overridden_by(file, tables)
    notes += [f"Not measured: {reason}" for _, reason in sorted(absent.items())]
    keep_secrets(tables, {path for path, _ in given}, file, kinds)
    for path, value in given:
        assign(tables, path, value)
    training = dict(cast(type[Backbone], backbone_class).training)
    for path, value in (launched or {}).items():
        table, option = path.split(".")
        defaults = training if table == "train" else tables.setdefault(table, {})
        defaults[option] = value if table == "train" else defaults.get(option, value)
    presets.fill(tables, training, TABLES)
    config = _make(tables, kinds)
    notes += presets.departures(config.tables)
    notes += presets.kept_from_pairs(made, config.tables)
    if recipe is None and file is None:
        built = table_of(made_with, "pairs").get("name") or tables["pairs"].get("name")
        if paper := recipe_for(backbone, built, name_in(tables, "loss")):
            notes.append(
                f"This run has {backbone}'s defaults. For the values of the paper on {built} pairs "
                f"and the {name_in(tables, 'loss')} loss, add --recipe {paper}."
            )
    flags_of = {"--recipe": recipe, "--tier": tier}
    named_presets = tuple(f"{flag} {name}" for flag, name in flags_of.items() if name)
    return replace(config, notes=tuple(notes), presets=named_presets)


def _why_absent(metric: str) -> str:
    """Why a metric that a file names cannot be measured, as a sentence; empty if it can."""
    if not local.is_file(metric) and not registry.is_installed("metric", metric):
        return f"no installed package provides the metric '{metric}'."
    try:
        registry.load("metric", metric)
    except UserError as error:
        return str(error)
    return ""


def _made_with(recipe: Mapping[str, Any], backbone: str) -> dict[str, Any]:
    """What pairs were made with, by path; nothing for another backbone."""
    options, train, memory = (table_of(recipe, name) for name in ("backbone", "train", "memory"))
    if options.pop("name", None) != backbone:
        return {}
    made = {f"backbone.{option}": value for option, value in options.items()}
    made["train.mixed_precision"] = train.get("mixed_precision", "no")
    if quantization := memory.get("quantization"):
        made["memory.quantization"] = quantization
    return made


def _make(tables: Tables, kinds: Collection[str]) -> Config:
    engines = {name: _build(model, tables.get(name, {}), name) for name, model in ENGINES.items()}
    if "metric" in kinds:
        files = {registry.short_name(name) for name in tables["metric"] if local.is_file(name)}
        for name in engines["evaluate"].min_effects:  # type: ignore[attr-defined]
            if name not in files and not registry.is_installed("metric", name):
                raise unknown("metric", name, [*registry.named("metric"), *files])
    made: dict[str, Any] = dict.fromkeys(sorted(CHOSEN))
    store = _store(tables["pairs"]) if "store" in tables["pairs"] else None
    for kind in set(made) & set(kinds):
        if kind in tables and not (kind == "pairs" and store is not None):
            options = {key: value for key, value in tables[kind].items() if key != "name"}
            name = name_in(tables, kind)
            made[kind] = _build(registry.load(kind, name), options, kind, name)
    resolved_labeler = made["labeler"]
    if isinstance(resolved_labeler, LabelerFactory):
        resolved_labeler, made["labeler"] = _give_metrics(resolved_labeler)
    several: dict[str, dict[str, Any]] = {
        kind: {
            name: _build(registry.load(kind, name), table, f"{kind}.{name}", name)
            for name, table in tables.get(kind, {}).items()
            if kind in kinds
        }
        for kind in registry.SEVERAL
    }
    resolved: Tables = {name: _dump(model) for name, model in engines.items()}
    for kind, strategy in {**made, "labeler": resolved_labeler}.items():
        if strategy is not None:
            resolved[kind] = {"name": local.recorded(name_in(tables, kind)), **_dump(strategy)}
        elif kind == "pairs" and store is not None:
            resolved["pairs"] = {"store": _recorded(store)}
        elif kind in tables and kind not in kinds:
            resolved[kind] = tables[kind]
    for kind, made_of in several.items():
        if made_of or kind == "metric":
            resolved[kind] = {local.recorded(name): _dump(each) for name, each in made_of.items()}
        elif kind in tables and kind not in kinds:
            resolved[kind] = tables[kind]
    trained_by = {kind: each for kind in TRAINED_BY if (each := made.pop(kind)) is not None}
    rest: dict[str, Any] = {
        "pair_store": store,
        "metrics": _by_short_name(several["metric"]),
        "listeners": several["listener"],
        "checks": several["check"],
        "tables": resolved,
    }
    return Config(**engines, **made, trained_by=trained_by, **rest)  # type: ignore[arg-type]


def _by_short_name(metrics: Mapping[str, Model]) -> dict[str, Model]:
    """Metrics by the names that a report has for them: of a class in a file, that of the class.

    Raises:
        UserError: if two have the same.
    """
    found: dict[str, Model] = {}
    for name, each in metrics.items():
        short = registry.short_name(name) if local.is_file(name) else name
        if short in found:
            raise UserError(
                f"Two of the metrics are named '{short}'. Rename the class in its file."
            )
        found[short] = each
    return found


def _give_metrics(labeler: LabelerFactory) -> tuple[LabelerFactory, Labeler]:
    """The labeler with the options of its metrics resolved, and the one that judges by them."""
    if strays := sorted(labeler.options.keys() - set(labeler.metric_names)):
        raise unknown("metric of the labeler", strays[0], labeler.metric_names)
    metrics = {}
    for name in labeler.metric_names:
        options = labeler.options.get(name, {})
        made = _build(registry.load("metric", name), options, f"metric.{name}", name)
        metrics[name] = cast(Metric, made)
    options = {name: _dump(metric) for name, metric in metrics.items()}
    resolved = labeler.model_copy(update={"options": options})
    return resolved, resolved.with_metrics(metrics)


def _store(table: Mapping[str, Any]) -> str:
    if not isinstance(table["store"], str):
        raise UserError(f"pairs.store = {table['store']!r} is not a path. Write it in quotes.")
    if extra := sorted(table.keys() - {"store"}):
        raise UserError(
            f"pairs.{extra[0]} is an option of a strategy, but pairs.store names finished pairs, "
            f"'{table['store']}'. Remove one of the two."
        )
    return table["store"] if is_url(table["store"]) else str(folder_of(table["store"]))


def _recorded(store: str) -> str:
    """How run.toml names finished pairs: an absolute path, or a URL without credentials."""
    return without_credentials(store) if is_url(store) else absolute(store)


def _build(model: type[Model], options: Any, path: str, name: str = "") -> Model:
    if not isinstance(options, Mapping):
        raise UserError(f"'{path}' is {options!r}, not a table. Set its options one by one.")
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
        # A fault of several options together has no location.
        what = where if hidden or not detail["loc"] else f"{where} = {detail['input']!r}"
        raise UserError(f"{what}: {fault_reason(detail)}. See {see}.") from error


def _dump(model: BaseModel) -> dict[str, Any]:
    """Plain values of the options that are set, without secrets: TOML has no null."""
    plain = model.model_dump(mode="json", exclude_none=True)
    for secret in getattr(model, "secrets", ()):
        if plain.get(secret):
            del plain[secret]
    try:
        tomli_w.dumps(plain)
    except (TypeError, ValueError) as error:  # a plugin's options
        raise UserError(
            f"The options of {type(model).__name__} in {type(model).__module__} cannot be written "
            f"to a run.toml ({error}). Its author must use plain types."
        ) from error
    return plain
