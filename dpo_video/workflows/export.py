"""Export a run's adapter for other programs, with a model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from dpo_video import registry
from dpo_video.data.store import PairStore
from dpo_video.errors import RunError, StoreError, UserError
from dpo_video.exporting.export import Check
from dpo_video.exporting.export import export as export_adapter
from dpo_video.exporting.model_card import RunSummary, loading_script, model_card
from dpo_video.extensions import AdapterFormat, MergedFormat
from dpo_video.settings import MemorySettings
from dpo_video.strategies import VideoModel
from dpo_video.support.claims import WRITER, claim
from dpo_video.support.urls import is_url
from dpo_video.training.checkpoint import check_manifest, kept_adapter
from dpo_video.types import ExportSpec
from dpo_video.workflows.config import Config
from dpo_video.workflows.options import checked, configure
from dpo_video.workflows.presets import Tables
from dpo_video.workflows.results import ExportResult
from dpo_video.workflows.runs import Run, verdict_of
from dpo_video.workflows.session import load_model, pick_device

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@checked
def export(
    run: Run | Path | str,
    format: AdapterFormat | MergedFormat | str = "diffusers",
    out: Path | str | None = None,
    *,
    checkpoint: int | None = None,
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    allow_code: bool | None = None,
    device: str | None = None,
    set: Mapping[str, Any] | Sequence[str] | None = None,
) -> ExportResult:
    """Write a run's adapter so that other programs load it, with a model card.

    The export is loaded back and compared with the run before its folder gets its name.

    Args:
        run: The run or its folder.
        format: "diffusers", "peft", "comfyui", or "merged" for a complete checkpoint;
            or one of a plugin.
        out: A new folder; by default RUN/export/FORMAT-STEP.
        checkpoint: The step to export; the last checkpoint by default.
        dtype: Precision of the weights in the files; by default their own, and fp32 for "merged".
            Merged weights in half precision are refused if rounding makes an error of more than 5%
            of the adapter's update.
        allow_code: Run the Python file of the run's backbone.
        device: As for training.
        set: Options of the format by path: {"format.NAME": value}.

    Raises:
        UserError: if the format does not suit the run.
        RunError: if there is no such run or checkpoint, or `out` exists.
        BusyError: if another process is exporting to `out`.
        ExportError: if the export does not load back as what was exported.
    """
    run = Run.open(run)
    config = configure(
        "run",
        {
            "config": run.folder / "run.toml",
            "allow_code": allow_code,
            "device": device,
            "format": format,
            "set": set,
        },
        kinds=("backbone", "format"),
    )
    target = config.format
    assert isinstance(target, AdapterFormat | MergedFormat)
    merges = isinstance(target, MergedFormat)
    if merges and "model" not in type(config.backbone).model_fields:
        raise UserError(
            f"The backbone '{config.tables['backbone']['name']}' has no option 'model' that could "
            "load a merged checkpoint. Export with --format diffusers or peft."
        )
    quantization = config.memory.quantization
    if merges and quantization != "native":
        raise UserError(
            f"The adapter of '{run.folder}' was trained on a base in {quantization}, so it must "
            "not be merged into other weights. Export with --format diffusers or peft."
        )
    # Published adapters go on the published weights.
    config = dataclasses.replace(config, memory=MemorySettings())
    with kept_adapter(run.folder, checkpoint) as adapter:
        summary = _summary(run, config, adapter.parent.name)
        named = registry.short_name(config.tables["format"]["name"])
        folder = Path(out) if out is not None else run.folder / f"export/{named}-{summary.step}"
        name = f".{folder.name}{WRITER}"
        with claim(folder.parent, name, instead="name another folder with --out"):
            return _export(config, adapter, target, folder, summary, dtype)


def _export(
    config: Config,
    adapter: Path,
    target: AdapterFormat | MergedFormat,
    folder: Path,
    summary: RunSummary,
    dtype: str | None,
) -> ExportResult:
    if folder.exists():
        raise RunError(f"'{folder}' exists already. Delete it, or name another folder with --out.")
    where = pick_device(config.run.device)
    model = load_model(config, where)

    def card(spec: ExportSpec, check: Check) -> str:
        script = loading_script(
            model,
            spec,
            format=target,
            folder=folder,
            adapted=check.adapted,
            prompt=config.backbone.prompts(1)[0],
        )
        return model_card(
            summary,
            spec,
            format=target,
            script=script,
            change=check.change,
            difference=check.difference,
        )

    def reload(folder: Path) -> VideoModel:
        options = {**config.backbone.model_dump(exclude_unset=True), "model": str(folder)}
        backbone = type(config.backbone)(**options)
        return load_model(dataclasses.replace(config, backbone=backbone), where)

    check = export_adapter(
        model,
        adapter,
        target,
        folder,
        name=summary.name,
        card=card,
        reload=reload,
        dtype=DTYPES[dtype] if dtype else None,
    )
    return ExportResult(folder=folder, format=config.tables["format"]["name"], check=check)


def _summary(run: Run, config: Config, checkpoint: str) -> RunSummary:
    step = int(checkpoint.removeprefix("step_"))
    return RunSummary(
        name=run.name,
        tables=_trained_with(run, config, checkpoint),
        versions=run.versions,
        pairs=_pairs(config),
        checkpoint=checkpoint,
        step=step,
        verdict=verdict_of(run.reports[:step], run.toml),
        evaluation=run.evaluation(step),
    )


def _trained_with(run: Run, config: Config, checkpoint: str) -> Tables:
    """The run's options as its checkpoint recorded them; run.toml may have been edited since."""
    tables = {name: dict(table) for name, table in config.tables.items()}
    recorded: Mapping[str, Any] = {}
    with suppress(RunError):  # its training may have deleted it meanwhile
        recorded = check_manifest(run.folder / "checkpoints" / checkpoint, "adapter").options
    for path, value in recorded.items():
        table, _, option = path.partition(".")
        if table in ("train", "loss") and option in tables.get(table, {}):
            tables[table][option] = value
    return tables


def _pairs(config: Config) -> str:
    """What the run was trained on, in words."""
    if config.pair_store is None:
        count = f"{config.build.count} " if config.build.count else ""
        return f"{count}{config.tables['pairs']['name']}"
    elsewhere = f"the pairs in '{config.tables['pairs']['store']}'"
    if is_url(config.pair_store):  # an export opens no address that a run names
        return elsewhere
    try:
        store = PairStore(config.pair_store)
    except StoreError:  # deleted since
        return elsewhere
    return f"{len(store)} {store.manifest.recipe.get('pairs', {}).get('name', 'pairs')}"
