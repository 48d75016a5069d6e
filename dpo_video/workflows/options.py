"""The keyword arguments of the workflows, and how they become a configuration."""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dpo_video import registry
from dpo_video.data.store import PairStore
from dpo_video.errors import UserError, unknown
from dpo_video.extensions import Optimizer, PairCheck, Schedule, TimestepSampler
from dpo_video.registry import local
from dpo_video.strategies import Backbone, Loss, Metric, Reference, Strategy
from dpo_video.workflows.config import TRAINED_BY, Config, resolve
from dpo_video.workflows.tables import ENGINES, table_of


class Options(TypedDict, total=False):
    """Options that every workflow takes; None and a missing one leave the default."""

    backbone: Backbone | str | None
    config: Path | str | None
    """A TOML file to start from, such as a run's run.toml."""
    set: Mapping[str, Any] | Sequence[str] | None
    """Any option by its path: {"loss.beta": 500}, or ["loss.beta=500"]."""
    tier: str | None
    """The card whose presets apply."""
    allow_code: bool | None
    """Run the Python files that `config`, or the run, names as strategies."""
    device: str | None
    deterministic: bool | None


class BuildOptions(Options, total=False):
    """Options of building pairs."""

    recipe: str | None
    """The recipe whose values hold where no other option is given."""
    labeler: Strategy | str | None
    clips: Path | str | None
    slow_down: bool | None
    scene_cuts: bool | None
    prompt: str | None
    prompts: Path | str | None
    seed: int | None
    count: int | None
    previews: bool | None
    rebuild: bool | None
    """Build pairs again that another version has built."""
    accept_pairs: bool | None
    """Use pairs that another version has built."""


class TrainOptions(BuildOptions, total=False):
    """Options of training: those of building pairs, the strategies, and [train] by name."""

    loss: Loss | str | None
    reference: Reference | str | None
    timesteps: TimestepSampler | str | None
    optimizer: Optimizer | str | None
    schedule: Schedule | str | None
    metrics: Sequence[Metric | str] | None
    steps: int | None
    batch_size: int | None
    gradient_accumulation_steps: int | None
    learning_rate: float | None
    betas: tuple[float, float] | None
    weight_decay: float | None
    warmup_steps: int | None
    decay: float | None
    max_grad_norm: float | None
    rank: int | None
    alpha: float | None
    mixed_precision: str | None
    skips: int | None
    save_steps: int | None
    save_total_limit: int | None
    validation_videos: int | None
    validation_prompts: Path | str | None
    labels: Sequence[str] | None
    min_decided: float | None
    report_to: str | None
    project: str | None
    run_name: str | None
    init_from: str | None
    lora: Mapping[str, Any] | None


class EvaluateOptions(Options, total=False):
    """Options of an evaluation: [evaluate] by name, and the metrics."""

    metrics: Sequence[Metric | str] | None
    prompts: Path | str | None
    num_prompts: int | None
    num_videos_per_prompt: int | None
    seed: int | None
    batch_size: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    tolerance: float | None
    min_effect: float | None
    min_effects: dict[str, float] | None
    min_prompts: int | None


Function = TypeVar("Function", bound=Callable[..., Any])
_STRICT = ConfigDict(arbitrary_types_allowed=True, strict=True)


def checked(function: Function) -> Function:
    """Check the types of a workflow's own arguments; options are checked when they are resolved.

    The function then raises a UserError for an argument of another type than its annotation.
    """
    signature = inspect.signature(function)
    adapters: dict[str, TypeAdapter[Any]] = {}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not adapters:
            hints = get_type_hints(function)
            shared = get_type_hints(Options)
            for name in ("config", "set", "tier", "device"):
                hints.setdefault(name, shared[name])
            for name in hints.keys() - {"return", "options"}:
                adapters[name] = TypeAdapter(hints[name], config=_STRICT)
        given = signature.bind(*args, **kwargs).arguments
        for name, value in {**given, **given.get("options", {})}.items():
            if name not in adapters:
                continue
            try:
                adapters[name].validate_python(value)
            except ValidationError as error:
                own_hint = signature.parameters.get(name)
                hint = (
                    own_hint.annotation
                    if own_hint
                    else Options.__annotations__[name].__forward_arg__
                )
                where = f"{function.__name__}({name}={reprlib.repr(value)})"
                see = f"help(dpo_video.{function.__name__})"
                raise UserError(f"{where}: pass a value of type {hint}. See {see}.") from error
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def with_options(function: Function) -> Function:
    """Show the keywords of `**options` in a function's signature, for help and tab completion."""
    (options,) = get_args(get_type_hints(function)["options"])
    signature = inspect.signature(function)
    *parameters, _ = signature.parameters.values()
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in get_type_hints(options).items()
    ]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def configure(
    table: str,
    options: Mapping[str, Any],
    pairs: object = None,
    more: Mapping[str, Any] | None = None,
    kinds: Collection[str] = registry.KINDS,
    launched: Mapping[str, Any] | None = None,
    checks: Sequence[PairCheck | str] | None = None,
) -> Config:
    """Resolve the keyword arguments of a workflow.

    Args:
        table: The table whose options are keywords: `learning_rate=3e-4` of "train".
        options: Keywords by name: those of `Options`, options of `table`, [run] and [build].
        pairs: A pair builder, its name, a `PairStore`, or the folder or URL of one. Finished pairs
            bring the backbone that they were made with, its options and its precision, where no
            other option says otherwise.
        more: Options by their paths.
        kinds: The kinds of strategies that are needed; see `resolve`.
        launched: The same from a launcher, beneath all others but the defaults.
        checks: Checks of pairs or their names; None where no pairs are checked.

    Raises:
        UserError: for an unknown name or option, or a value of the wrong type.
    """
    given = {
        name: value for name, value in options.items() if not (value is None or value in ((), []))
    }
    choices: dict[str, Any] = {
        kind: given.pop(kind, None) for kind in (*TRAINED_BY, "backbone", "labeler", "format")
    }
    allow_code, listeners = bool(given.pop("allow_code", False)), given.pop("listeners", ())
    file, paths = given.pop("config", None), given.pop("set", ())
    metrics, tier = given.pop("metrics", ()), given.pop("tier", None)
    for name in (*choices.values(), *listeners, *metrics, *(checks or ()), pairs):
        # Typed, so the file may run.
        if isinstance(name, str) and local.is_file(name := name.removeprefix("+")):
            local.allow(name)
    if isinstance(prompt := given.get("prompt"), list | tuple):
        if len(prompt) > 1:
            raise UserError(
                "There are several --prompt. Name one, or a file of prompts with --prompts FILE."
            )
        (given["prompt"],) = prompt
    recipe, made_with = given.pop("recipe", None), None
    flags = dict(more or {})
    if isinstance(paths, Mapping):
        for path, value in paths.items():
            if "." in path:
                flags[path] = value
            elif isinstance(value, Mapping):  # {"loss": {"beta": 500}}
                flags |= {f"{path}.{name}": each for name, each in value.items()}
            else:
                raise UserError(f"set = {{{path!r}: ...}} names no option, such as 'loss.beta'.")
        paths = ()
    if (store := _finished_pairs(pairs)) is not None:
        pairs, made_with = store, PairStore(store).manifest.recipe
        made_in = table_of(made_with, "backbone").get("name")
        if choices["backbone"] is None and file is None and local.is_file(str(made_in)):
            choices["backbone"] = kept = local.below(Path(store), str(made_in))
            if allow_code:
                local.allow(kept)
    homes = {
        field: home for home in ("build", "run", table) for field in ENGINES[home].model_fields
    }
    for name, value in given.items():
        if name not in homes:
            raise unknown(
                "option",
                name,
                {*homes, *choices, "metrics", "listeners", "tier", "config", "set", "recipe"},
            )
        flags[f"{homes[name]}.{name}"] = str(value) if isinstance(value, Path) else value
    return resolve(
        recipe=recipe,
        file=Path(file) if file is not None else None,
        choices={**choices, "pairs": pairs},
        metrics=metrics,
        listeners=listeners,
        checks=checks,
        tier=tier,
        flags=flags,
        assignments=paths,
        made_with=made_with,
        kinds=kinds,
        launched=launched,
        allow_code=allow_code,
    )


def _finished_pairs(pairs: object) -> str | None:
    """The folder or URL that `pairs` stands for; None if it stands for a pair builder."""
    if isinstance(pairs, PairStore):
        return pairs.address
    if isinstance(pairs, Path):
        return str(pairs)
    return pairs if isinstance(pairs, str) and registry.is_store(pairs) else None
