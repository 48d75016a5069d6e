"""Build, train and evaluate several recipes with the same seeds and prompts."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from dpo_video import registry
from dpo_video.errors import UserError, unknown
from dpo_video.evaluation.compare import Cell, Comparison
from dpo_video.evaluation.evaluate import sample_videos
from dpo_video.evaluation.results import Evaluation
from dpo_video.support.atomic import write_text, writing
from dpo_video.support.tensor_tree import load_state, save_state
from dpo_video.types import Videos
from dpo_video.workflows import config as configs
from dpo_video.workflows.build import obtain_pairs
from dpo_video.workflows.config import Config
from dpo_video.workflows.estimate import choose_blocks
from dpo_video.workflows.evaluate import evaluate_run
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.session import accelerator_for, builder_labeler, load_model, pick_device
from dpo_video.workflows.train import run_training, write_run

_KINDS = ("pairs", "loss", "reference", "backbone", "labeler")
_KEYS = {*_KINDS, "set", "seeds"}
_QUIET = {"train.report_to": "none", "train.validation_videos": 0, "build.previews": False}


def compare(
    recipes: Sequence[Path | str] | None = None,
    *,
    only: Sequence[str] | None = None,
    training_seeds: Sequence[int] | None = None,
    steps: int | None = None,
    seeds: int | None = None,
    out: Path | str = "runs/compare",
    device: str | None = None,
    progress: Progress = SILENT,
) -> Comparison:
    """Build, train and evaluate several recipes with the same seeds and prompts.

    Every cell is a run of its own, OUT/RECIPE/seed-N. Finished cells are not run again.

    Args:
        recipes: TOML files: recipes, or a run.toml; those of the package by default. A recipe is a
            table: [NAME], pairs = "local", set = ["train.learning_rate=1e-4"], seeds = [0, 1, 2].
        only: Names of the recipes to run; all by default.
        training_seeds: Seeds of pairs and training, for all recipes.
        steps: Optimizer steps of every recipe.
        seeds: Number of videos of base and tuned model each, as `evaluate.seeds`.
        out: The folder of all runs, with comparison.json, comparison.md, frontier.svg and
            index.html.
        device: As for training.
        progress: Receives the progress.

    Raises:
        UserError: for a recipe that cannot be read or resolved, before the first one runs.
    """
    folder = Path(out)
    flags = {"train.steps": steps, "evaluate.seeds": seeds, "run.device": device}
    # All recipes are resolved before the first one runs: a typo must not surface after an hour.
    work = []
    for recipe in _chosen(_read(recipes), only):
        for seed in training_seeds or recipe.seeds:
            config = recipe.resolve({**flags, "run.seed": seed})
            where = pick_device(config.run.device)
            # With a number in place of checkpointing=auto, as run.toml will have it.
            work.append((recipe.name, seed, choose_blocks(config, device=where, progress=progress)))
    cells = []
    for name, seed, config in work:
        run = folder / name / f"seed-{seed}"
        evaluation = _finished(run, config)
        if evaluation is None:
            progress.note(f"{name}, seed {seed}")
            evaluation = _measure(config, run, folder, progress)
        cells.append(Cell.of(name, seed, evaluation))
    comparison = Comparison.of(
        cells,
        machine=f"{platform.system()} {platform.machine()}, {work[0][2].run.device} device",
        versions=tomllib.loads(work[0][2].toml())["versions"],
    )
    with writing(folder):
        write_text(folder / "comparison.json", comparison.model_dump_json(indent=1) + "\n")
        write_text(folder / "comparison.md", comparison.markdown())
        if comparison.drawable:
            write_text(folder / "frontier.svg", comparison.picture())
        comparison.page(folder / "index.html")
    return comparison


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """A named recipe of a file."""

    name: str
    file: Path
    table: Mapping[str, Any] | None
    """None if the file as a whole is a run.toml."""

    @property
    def seeds(self) -> list[int]:
        """The training seeds that the recipe names; 0 by default."""
        seeds = (self.table or {}).get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or any(type(n) is not int for n in seeds):
            raise UserError(
                f"Recipe '{self.name}' of '{self.file}': seeds is a list of numbers, as in "
                "seeds = [0, 1, 2]."
            )
        return seeds

    def resolve(self, flags: Mapping[str, Any]) -> Config:
        """The run's configuration."""
        try:
            if self.table is None:
                return configs.resolve(file=self.file, flags={**_QUIET, **flags})
            return configs.resolve(
                choices={kind: self.table.get(kind) for kind in _KINDS},
                # Options for all recipes override those of one recipe.
                assignments=[*_texts(_QUIET), *self.table.get("set", []), *_texts(flags)],
            )
        except UserError as error:
            raise UserError(f"Recipe '{self.name}' of '{self.file}': {error}") from error


def _texts(flags: Mapping[str, Any]) -> list[str]:
    return [f"{path}={json.dumps(v)}" for path, v in flags.items() if v is not None]


def _read(paths: Sequence[Path | str] | None) -> list[_Recipe]:
    found: list[_Recipe] = []
    for path in map(Path, paths or [str(files("dpo_video.workflows") / "recipes.toml")]):
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"Cannot read '{path}': {error.strerror}. Name a TOML file.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"'{path}' is not valid TOML: {error}. Correct it.") from error
        if tables.keys() & {*configs.ENGINES, *registry.KINDS}:
            found.append(_Recipe(name=path.stem, file=path, table=None))
            continue
        for name, table in tables.items():
            if not isinstance(table, dict) or (strange := sorted(table.keys() - _KEYS)):
                wrong = f"'{strange[0]}'" if isinstance(table, dict) else "no table"
                raise UserError(
                    f"Recipe '{name}' of '{path}' has {wrong}. A recipe is [NAME] with "
                    f"{', '.join(sorted(_KEYS))}; options go into set = "
                    '["train.learning_rate=1e-4"].'
                )
            found.append(_Recipe(name=name, file=path, table=table))
    names = [recipe.name for recipe in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"Two recipes are named '{twice}'. Rename one of them.")
    if not found:
        raise UserError('The files name no recipe. Write one: [NAME] and pairs = "local".')
    return found


def _chosen(recipes: list[_Recipe], only: Sequence[str] | None) -> list[_Recipe]:
    names = [recipe.name for recipe in recipes]
    for name in only or ():
        if name not in names:
            raise unknown("recipe", name, names)
    return [recipe for recipe in recipes if not only or recipe.name in only]


def _finished(folder: Path, config: Config) -> Evaluation | None:
    """The evaluation of an earlier call with the same configuration."""
    if not (folder / "evaluation" / "evaluation.json").exists():
        return None
    _check_same(folder, config)
    return Evaluation.load(folder / "evaluation")


def _check_same(folder: Path, config: Config) -> None:
    before = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))
    before.pop("versions", None)
    if before != config.tables:
        raise UserError(
            f"'{folder}' was run with other settings than this recipe's. Name another --out, or "
            "delete that folder to run it again."
        )


def _measure(config: Config, folder: Path, out: Path, progress: Progress) -> Evaluation:
    builder_labeler(config)
    accelerator = accelerator_for(config, folder)
    model = load_model(config, accelerator.device)
    base = _base_videos(config, out, progress)
    store = obtain_pairs(config, model, out / "pairs", progress=progress)
    resume = (folder / "checkpoints" / "latest").exists()
    if resume:
        _check_same(folder, config)
    write_run(config, store, folder, accelerator)
    run = run_training(config, model, store, folder, accelerator, resume=resume, progress=progress)
    command = shlex.join(["dpo-video", "evaluate", str(folder)])
    return evaluate_run(
        run, config, folder / "evaluation", command=command, base=base, progress=progress
    )


def _base_videos(config: Config, out: Path, progress: Progress) -> Videos:
    """The base model's videos, drawn once for all recipes with equal settings."""
    model = load_model(config, pick_device(config.run.device))
    settings = [model.identity, config.tables["backbone"], config.tables["evaluate"]]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    path = out / f"base-{digest}.safetensors"
    if not path.exists():
        prompts = config.backbone.prompts(config.evaluate.seeds)
        drawn: list[Videos] = []
        for part in sample_videos(model, model.denoiser, prompts, config.evaluate):
            drawn.append(part)
            progress.update("base videos", sum(map(len, drawn)), len(prompts))
        save_state(path, {"videos": torch.cat(drawn)})
    videos: Videos = load_state(path)["videos"]
    return videos
