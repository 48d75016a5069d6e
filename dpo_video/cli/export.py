"""`dpo-video export`."""

from __future__ import annotations

import dataclasses
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_video.cli.options import Checkpoint, Device, console, resolve
from dpo_video.cli.train import slope_of
from dpo_video.errors import RunError, StoreError, UserError
from dpo_video.settings import MemorySettings

if TYPE_CHECKING:
    from dpo_video.exporting.export import Check
    from dpo_video.exporting.model_card import RunSummary
    from dpo_video.strategies import VideoModel
    from dpo_video.types import ExportSpec
    from dpo_video.workflows.config import Config


class Target(StrEnum):
    """`dpo_video.exporting.export.Format`, which would import torch."""

    diffusers = "diffusers"
    peft = "peft"
    comfyui = "comfyui"
    merged = "merged"


class Precision(StrEnum):
    """Of the weights in the files."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    target: Annotated[
        Target,
        typer.Option(
            "--format",
            help="diffusers: load_lora_weights reads it. peft: PeftModel.from_pretrained does. "
            "comfyui: ComfyUI does. merged: a whole checkpoint with the adapter in it.",
        ),
    ] = Target.diffusers,
    checkpoint: Checkpoint = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A new folder; RUN/export/FORMAT-STEP if left out."),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option("--dtype", help="Of the weights in the files; their own if left out."),
    ] = None,
    device: Device = None,
) -> None:
    """Write a run's adapter so that other programs load it, with a model card.

    It is loaded back and compared with the run before anything is said to be done.
    """
    if not (run / "run.toml").is_file():
        raise RunError(f"'{run}' is not a run: it has no run.toml. Name a folder under runs/.")
    config = resolve(run / "run.toml", None, run_device=device)
    if target is Target.merged and "model" not in type(config.backbone).model_fields:
        raise UserError(
            f"The backbone '{config.tables['backbone']['name']}' has no option 'model' to load a "
            "merged checkpoint by. Export with --format diffusers or peft."
        )
    base = config.memory.quantization
    if target is Target.merged and base != "native":
        raise UserError(
            f"The adapter of '{run}' was trained on a base in {base}, and is nothing for other "
            "weights to be changed by for good. Export with --format diffusers or peft."
        )
    # What is published goes on the published weights.
    config = dataclasses.replace(config, memory=MemorySettings())
    import torch

    from dpo_video.exporting.export import Format
    from dpo_video.exporting.export import export as export_adapter
    from dpo_video.exporting.model_card import loading_script, model_card
    from dpo_video.training.run_dir import checkpoint_at
    from dpo_video.workflows.session import load_model, pick_device

    folder = checkpoint_at(run, checkpoint)
    summary = _summary(run, config, folder.name)
    place = out or run / "export" / f"{target.value}-{summary.step}"
    if place.exists():
        raise RunError(f"'{place}' exists already. Delete it, or name another folder with --out.")
    where = pick_device(config.run.device)
    model = load_model(config, where)

    def card(spec: ExportSpec, check: Check) -> str:
        script = ""
        if target is not Target.comfyui:
            script = loading_script(
                model,
                spec,
                format=target.value,
                folder=place,
                adapted=check.adapted,
                prompt=config.backbone.prompts(1)[0],
            )
        return model_card(
            summary,
            spec,
            format=target.value,
            script=script,
            change=check.change,
            difference=check.difference,
        )

    def reload(folder: Path) -> VideoModel:
        options = {**config.backbone.model_dump(exclude_unset=True), "model": str(folder)}
        backbone = type(config.backbone)(**options)
        return load_model(dataclasses.replace(config, backbone=backbone), where)

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    check = export_adapter(
        model,
        folder / "adapter",
        Format(target.value),
        place,
        name=summary.name,
        card=card,
        reload=reload,
        dtype=dtypes[dtype.value] if dtype else None,
    )
    console.print(
        f"Loaded back and compared: the predictions differ by {check.difference:.2g} of their "
        f"size; the adapter changes them by {check.change:.2g}."
    )
    if target is Target.merged and check.difference > check.change / 2:
        console.print(
            "[yellow]Most of what was learned is lost in rounding.[/] Export with --dtype fp32, or "
            "keep the adapter apart (--format diffusers)."
        )
    console.print(f"How to load it: [bold]{place / 'README.md'}[/]")


def _summary(run: Path, config: Config, checkpoint: str) -> RunSummary:
    from dpo_video.evaluation.results import Evaluation
    from dpo_video.exporting.model_card import RunSummary
    from dpo_video.training.diagnosis import judge_training
    from dpo_video.training.run_dir import read_log

    step = int(checkpoint.removeprefix("step_"))
    reports = read_log(run)[:step]
    found = run / f"evaluation-{step}" / "evaluation.json"
    if not found.is_file():
        found = run / "evaluation" / "evaluation.json"
    return RunSummary(
        name=run.resolve().name,
        tables=config.tables,
        versions=tomllib.loads((run / "run.toml").read_text(encoding="utf-8")).get("versions", {}),
        pairs=_pairs(config),
        checkpoint=checkpoint,
        step=step,
        verdict=judge_training(reports, slope=slope_of(reports)) if reports else None,
        evaluation=Evaluation.from_json(found.read_text(encoding="utf-8"))
        if found.is_file()
        else None,
    )


def _pairs(config: Config) -> str:
    """What the run was trained on, in words."""
    from dpo_video.data.store import PairStore

    if not isinstance(config.pairs, str):
        count = f"{config.build.count} " if config.build.count else ""
        return f"{count}{config.tables['pairs']['name']}"
    try:
        store = PairStore(config.pairs)
    except StoreError:  # it may have been deleted since
        return f"the pairs in '{config.pairs}'"
    return f"{len(store)} {store.manifest.recipe.get('pairs', {}).get('name', 'pairs')}"
