"""`dpo-video compare`."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dpo_video.cli.build import obtain_pairs, progress_bar
from dpo_video.cli.estimate import choose_blocks
from dpo_video.cli.evaluate import evaluate_run
from dpo_video.cli.options import Device, Json, console
from dpo_video.cli.train import run_training, write_run
from dpo_video.errors import UserError

if TYPE_CHECKING:
    from dpo_video.evaluation.results import Evaluation
    from dpo_video.types import Videos
    from dpo_video.workflows.config import Config

_KEYS = {"pairs", "loss", "reference", "backbone", "labeler", "set", "seeds"}


def compare(
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(help="TOML files: recipes, or a run.toml. Our own recipes if left out."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A recipe's name; repeat for more.")
    ] = None,
    training_seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="A seed of pairs and training, for all; repeat for more."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Optimizer steps of every recipe.")
    ] = None,
    videos: Annotated[
        int | None, typer.Option("--videos", min=2, help="Videos of base and tuned each.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The folder of all its runs.")] = Path(
        "runs/compare"
    ),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Build, train and evaluate several recipes with the same seeds and prompts; one table.

    A recipe is a table of a TOML file: [NAME], pairs = "local",
    set = ["train.learning_rate=1e-4"], and for several trainings seeds = [0, 1, 2].

    Every cell is a run of its own, OUT/RECIPE/seed-N. What is measured is kept and not run again.
    """  # fmt: skip
    chosen = _chosen(_read(recipes), only)
    flags = {"train.steps": steps, "evaluate.seeds": videos, "run.device": device}
    # Every recipe is resolved before the first is run: a typo must not surface after an hour.
    work = [
        (recipe.name, seed, _settled(recipe.resolve({**flags, "run.seed": seed})))
        for recipe in chosen
        for seed in training_seed or recipe.seeds
    ]
    from dpo_video.evaluation.compare import Cell, Comparison
    from dpo_video.support.atomic import write_text, writing

    cells = []
    for name, seed, config in work:
        folder = out / name / f"seed-{seed}"
        evaluation = _finished(folder, config) or _measure(name, config, folder, out)
        cells.append(Cell.of(name, seed, evaluation))
    comparison = Comparison.of(
        cells,
        machine=f"{platform.system()} {platform.machine()}, {work[0][2].run.device} device",
        versions=tomllib.loads(work[0][2].toml())["versions"],
    )
    with writing(out):
        write_text(out / "comparison.json", comparison.model_dump_json(indent=1) + "\n")
        write_text(out / "comparison.md", comparison.markdown())
        write_text(out / "frontier.svg", comparison.picture())
        comparison.page(out / "index.html")
    if as_json:
        typer.echo(comparison.model_dump_json(indent=1))
        return
    Console().print(comparison.table())
    console.print(f"Page: [bold]{out / 'index.html'}[/]; each run has its own page under {out}")


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """A named way to run, as a file gives it."""

    name: str
    file: Path
    table: Mapping[str, Any] | None
    """None if the file as a whole is a run.toml."""

    @property
    def seeds(self) -> list[int]:
        """What it is trained with if the command line names no seed."""
        seeds = (self.table or {}).get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or any(type(n) is not int for n in seeds):
            raise UserError(
                f"Recipe '{self.name}' of '{self.file}': seeds is a list of numbers, as in "
                "seeds = [0, 1, 2]."
            )
        return seeds

    def resolve(self, flags: Mapping[str, Any]) -> Config:
        """The run's configuration."""
        from dpo_video.workflows import config

        kinds = ("pairs", "loss", "reference", "backbone", "labeler")
        quiet = {"train.report_to": "none", "train.validation_videos": 0, "build.previews": False}
        try:
            if self.table is None:
                return config.resolve(file=self.file, flags={**quiet, **flags})
            return config.resolve(
                choices={kind: self.table.get(kind) for kind in kinds},
                # What the command line says of all recipes goes before what one says of itself.
                assignments=[*_texts({**quiet}), *self.table.get("set", []), *_texts(flags)],
            )
        except UserError as error:
            raise UserError(f"Recipe '{self.name}' of '{self.file}': {error}") from error


def _settled(config: Config) -> Config:
    """With a number in the place of checkpointing=auto, as run.toml will have it."""
    if config.memory.checkpointing != "auto":
        return config
    from dpo_video.workflows.session import pick_device

    return choose_blocks(config, device=pick_device(config.run.device))


def _texts(flags: Mapping[str, Any]) -> list[str]:
    return [f"{path}={json.dumps(v)}" for path, v in flags.items() if v is not None]


def _read(paths: list[Path] | None) -> list[_Recipe]:
    from dpo_video import registry
    from dpo_video.workflows import config

    found: list[_Recipe] = []
    for path in paths or [Path(str(files("dpo_video.workflows") / "recipes.toml"))]:
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"Cannot read '{path}': {error.strerror}. Name a TOML file.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"'{path}' is not valid TOML: {error}. Correct it.") from error
        if tables.keys() & {*config.ENGINES, *registry.KINDS}:
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


def _chosen(recipes: list[_Recipe], only: list[str] | None) -> list[_Recipe]:
    from dpo_video.errors import unknown

    names = [recipe.name for recipe in recipes]
    for name in only or ():
        if name not in names:
            raise unknown("recipe", name, names)
    return [recipe for recipe in recipes if not only or recipe.name in only]


def _finished(folder: Path, config: Config) -> Evaluation | None:
    """The evaluation that is there, if it is of this very configuration."""
    from dpo_video.evaluation.results import Evaluation

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


def _measure(name: str, config: Config, folder: Path, out: Path) -> Evaluation:
    from dpo_video.workflows.session import accelerator_for, builder_labeler, load_model

    console.rule(f"{name}, seed {config.run.seed}")
    builder_labeler(config)
    accelerator = accelerator_for(config, folder)
    model = load_model(config, accelerator.device)
    base = _base_videos(config, out)
    store = obtain_pairs(config, model, out / "pairs")
    resume = (folder / "checkpoints" / "latest").exists()
    if resume:
        _check_same(folder, config)
    write_run(config, folder, accelerator)
    run_training(config, model, store, folder, accelerator, resume=resume)
    command = shlex.join(["dpo-video", "evaluate", str(folder)])
    return evaluate_run(folder, config, folder / "evaluation", command=command, base=base)


def _base_videos(config: Config, out: Path) -> Videos:
    """What the base draws: once for all recipes that ask for the same."""
    import torch

    from dpo_video.evaluation.evaluate import sample_videos
    from dpo_video.support.tensor_tree import load_state, save_state
    from dpo_video.workflows.session import load_model, pick_device

    model = load_model(config, pick_device(config.run.device))
    asked = [model.identity, config.tables["backbone"], config.tables["evaluate"]]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:10]
    path = out / f"base-{digest}.safetensors"
    if not path.exists():
        prompts = config.backbone.prompts(config.evaluate.seeds)
        drawn = []
        with progress_bar() as bar:
            task = bar.add_task("base videos", total=len(prompts))
            for part in sample_videos(model, model.denoiser, prompts, config.evaluate):
                drawn.append(part)
                bar.update(task, advance=len(part))
        save_state(path, {"videos": torch.cat(drawn)})
    videos: Videos = load_state(path)["videos"]
    return videos
