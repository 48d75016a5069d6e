"""Resuming a run: what has changed since its checkpoint, what may, and the history of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from dpo_video.errors import RunError
from dpo_video.support.formatting import counted
from dpo_video.support.reading import read_toml
from dpo_video.training.checkpoint import Checkpoint, newest_checkpoint
from dpo_video.training.optimizer import learning_rate
from dpo_video.training.run_dir import checkpoints, read_log
from dpo_video.workflows.config import Config
from dpo_video.workflows.tables import CHANGES, DEFAULTS

_PROCESSES = "processes"
_ANY = ("memory.", "evaluate.", "metric.", "listener.", "check.", "versions.")
"""What was learned does not depend on these options, or only up to rounding."""
_PAIRS = (
    "pairs.",
    "labeler.",
    "run.clips",
    "run.slow_down",
    "run.scene_cuts",
    "run.prompt",
    "build.count",
    "build.prompts",
    "train.labels",
)
"""They choose the pairs, which a checkpoint identifies by their hash."""
_WEIGHTS = (
    "backbone.model",
    "backbone.revision",
    "backbone.config",
    "backbone.motion_adapter",
    "backbone.motion_adapter_revision",
    "backbone.motion_adapter_config",
    "train.init_from",
)
"""They choose the weights, which a checkpoint identifies by their hash."""
_FREE = {
    "run.device",
    "run.deterministic",
    "build.previews",
    "build.rebuild",
    "build.accept_pairs",
    "train.steps",
    "train.skips",
    "train.save_steps",
    "train.save_total_limit",
    "train.validation_prompts",
    "train.validation_videos",
    "train.report_to",
    "train.project",
    "train.run_name",
    *_WEIGHTS,
}
_FIXED = {
    "backbone.name",
    "optimizer.name",
    "run.seed",
    "train.rank",
    "train.alpha",
    "train.mixed_precision",
    "memory.quantization",
}
"""A run with another value is another run."""
_USUAL = {f"{kind}.name": DEFAULTS[kind] for kind in ("timesteps", "optimizer", "schedule")}
"""What a run used whose options do not say it."""
_ACCUMULATION = "train.gradient_accumulation_steps"
_PASSES = {"train.batch_size", _ACCUMULATION, _PROCESSES}
"""Their product is the number of pairs of a step."""


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by path: {"train.learning_rate": 1e-4}."""
    found: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def options_of(config: Config, processes: int) -> dict[str, Any]:
    """A run's options by path, with the number of its processes and the versions of its plugins."""
    plugins = {f"versions.{name}": each for name, each in config.plugin_versions().items()}
    return {**flat(config.tables), _PROCESSES: processes, **plugins}


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """The state of a run's folder before a call of `train`."""

    folder: Path
    checkpoint: Checkpoint | None
    """Where to resume from; None to start at step 0."""
    options: Mapping[str, Any]
    """The options of the run so far, by path."""
    versions: Mapping[str, str]
    """The versions of the packages that the run was last trained with."""
    history: list[dict[str, Any]]
    """The changes of earlier calls, as run.toml holds them."""

    @classmethod
    def of(cls, folder: Path, note: Callable[[str], None]) -> Self:
        """Read a run's folder; `note` receives a sentence on a damaged checkpoint.

        Raises:
            RunError: if all of its checkpoints are damaged, or run.toml or log.jsonl.
        """
        if not checkpoints(folder):
            return cls(folder=folder, checkpoint=None, options={}, versions={}, history=[])
        checkpoint = newest_checkpoint(folder, note)
        read_log(folder)  # a damaged one must not surface after the training
        try:
            tables = read_toml(folder / "run.toml")
            history = list(tables.pop(CHANGES, []))
            versions = dict(tables.pop("versions", {}))
            options = dict(checkpoint.manifest.options) or flat(tables)
            for change in history:
                # Accepted, and stopped before the next checkpoint.
                if change["step"] >= checkpoint.manifest.step:
                    change["step"] = checkpoint.manifest.step
                    options = {
                        **{k: v for k, v in options.items() if k not in change["then"]},
                        **change["now"],
                    }
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise RunError(
                f"'{folder / 'run.toml'}' cannot be read ({error}). Copy it again, or correct it."
            ) from error
        return cls(
            folder=folder, checkpoint=checkpoint, options=options, versions=versions,
            history=history,
        )  # fmt: skip

    @property
    def step(self) -> int:
        """Steps done."""
        return self.checkpoint.manifest.step if self.checkpoint else 0

    def changes(self, config: Config, processes: int) -> Changes:
        """What differs from the run so far."""
        now = options_of(config, processes)
        if not self.checkpoint:
            return Changes(step=0, then={}, now={})
        before = {_PROCESSES: processes, **_USUAL, **self.options}
        paths = [p for p in sorted(before.keys() | now.keys()) if before.get(p) != now.get(p)]
        # Labels are named without their hash until they are read.
        if "train.labels" in paths and _unpinned(before) == _unpinned(now):
            paths.remove("train.labels")
        versions = config.versions()
        moved = [p for p in versions if self.versions.get(p, versions[p]) != versions[p]]
        return Changes(
            step=self.step,
            then={
                **{p: before[p] for p in paths if p in before},
                **{f"versions.{p}": self.versions[p] for p in moved},
            },
            now={
                **{p: now[p] for p in paths if p in now},
                **{f"versions.{p}": versions[p] for p in moved},
            },
        )

    def check(self, config: Config, processes: int, *, accept: bool) -> None:
        """Refuse options that change what the run has learned so far.

        Raises:
            RunError: names them; with `accept` only for those that make another run of it.
        """
        changes = self.changes(config, processes)
        if config.train.steps < self.step:
            raise RunError(
                f"'{self.folder}' has {counted(self.step, 'step')} already, more than train.steps="
                f"{config.train.steps}. Name a larger number with --steps."
            )
        fixed = [p for p in changes.paths if p in _FIXED or p.startswith("train.lora.")]
        if fixed:
            raise RunError(
                f"Cannot resume '{self.folder}' with another {changes.text(fixed)}. Leave that "
                "out, or start a new run with another --out."
            )
        learned = [path for path in changes.paths if self._changes_learning(path, config, changes)]
        if learned and not accept:
            raise RunError(
                f"Cannot resume '{self.folder}' with other options than those of its {self.step} "
                f"steps: {changes.text(learned)}. {self._instead(changes)}"
            )

    def _instead(self, changes: Changes) -> str:
        """What to do about changes that make another run of it."""
        accept = "train on with them: --accept-changes"
        if _PROCESSES not in changes.paths:
            return f"Leave them out, or {accept}"
        then = _pairs_of_a_step(self.options, changes.then)
        now = _pairs_of_a_step(self.options, {**changes.now, _ACCUMULATION: 1})
        if then % now:
            return f"A step then sees other numbers of pairs; {accept}"
        return f"Keep the pairs of a step with --set {_ACCUMULATION}={then // now}, or {accept}"

    def _changes_learning(self, path: str, config: Config, changes: Changes) -> bool:
        if path == "train.steps":  # the learning rate may decay towards the last one
            before = config.train.model_copy(update={"steps": changes.then[path]})
            schedule = config.schedule
            return any(
                learning_rate(schedule, before, step) != learning_rate(schedule, config.train, step)
                for step in range(self.step)
            )
        if path in _PASSES:
            return _pairs_of_a_step(self.options, changes.now) != _pairs_of_a_step(
                self.options, changes.then
            )
        return not (path in _FREE or path.startswith((*_ANY, *_PAIRS)))


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Options of a resumed run that differ from those before."""

    step: int
    then: Mapping[str, Any]
    now: Mapping[str, Any]

    @property
    def paths(self) -> list[str]:
        """The options' paths."""
        return sorted(self.then.keys() | self.now.keys())

    def text(self, paths: list[str] | None = None) -> str:
        """The options with both values."""
        return ", ".join(
            f"{path} (then {_shown(self.then.get(path))}, now {_shown(self.now.get(path))})"
            for path in (self.paths if paths is None else paths)
        )

    def entry(self) -> dict[str, Any]:
        """The entry of run.toml."""
        return {
            "step": self.step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "then": dict(self.then),
            "now": dict(self.now),
        }


def _pairs_of_a_step(options: Mapping[str, Any], changed: Mapping[str, Any]) -> int:
    product = 1
    for path in _PASSES:
        product *= changed.get(path, options.get(path, 1))
    return product


def _unpinned(options: Mapping[str, Any]) -> list[str]:
    return [name.partition("@")[0] for name in options.get("train.labels", [])]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
