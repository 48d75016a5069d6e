"""The model card of an export: its use, its training and its evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import tomli_w
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from dpo_video.evaluation.change import Change
from dpo_video.evaluation.results import Evaluation
from dpo_video.exporting.updates import precision
from dpo_video.extensions import AdapterFormat, ExportFormat, MergedFormat
from dpo_video.paths import is_hub_id
from dpo_video.registry import short_name
from dpo_video.strategies import VideoModel
from dpo_video.support.formatting import apart, counted
from dpo_video.training.diagnosis import TrainingVerdict
from dpo_video.types import ExportSpec


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a model card tells about a run."""

    name: str
    tables: Mapping[str, Any]
    """Contents of run.toml."""
    versions: Mapping[str, str]
    pairs: str
    """Number and kind of the training pairs, in words."""
    checkpoint: str
    """Name of the checkpoint."""
    step: int
    """Optimizer steps of the checkpoint."""
    verdict: TrainingVerdict | None
    evaluation: Evaluation | None


def model_card(
    summary: RunSummary,
    spec: ExportSpec,
    *,
    format: ExportFormat,
    script: str,
    change: float,
    difference: float,
) -> str:
    """Render README.md: Markdown with the metadata header of the Hugging Face hub.

    Args:
        summary: The run.
        spec: Names of the model's parts in other programs.
        format: The format.
        script: Python that loads the export; empty if Python does not.
        change: Relative change of the predictions by the adapter.
        difference: Relative difference between the predictions of export and run.
    """
    merged = isinstance(format, MergedFormat)
    base = spec.source if _on_hub(spec) else None
    environment = Environment(
        loader=PackageLoader("dpo_video.exporting"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown; _cell escapes table cells
        keep_trailing_newline=True,
    )
    toml = tomli_w.dumps(_without_paths(summary.tables)).strip()
    backticks = max(map(len, re.findall("`+", f"{script}\n{toml}")), default=0)
    return environment.get_template("model_card.md.j2").render(
        base_model=base,
        base=f"[{base}](https://huggingface.co/{base})" if base else _local(summary),
        merged=merged,
        library=format.library,
        fence="`" * max(3, backticks + 1),
        name=_cell(summary.name),
        what="A fine-tuned checkpoint" if merged else "A LoRA adapter",
        use=format.usage(spec),
        script=script,
        settings=[(key, _cell(value)) for key, value in _settings(summary, spec)],
        verdict=summary.verdict,
        evaluation=summary.evaluation,
        scores=_scores(summary.evaluation) if summary.evaluation else [],
        measured=_measured(summary),
        change=f"{change:.2g}",
        difference=f"{difference:.2g}",
        licence=_licence(base, summary),
        toml=toml,
    )


def loading_script(
    model: VideoModel,
    spec: ExportSpec,
    *,
    format: ExportFormat,
    folder: Path,
    adapted: Sequence[str],
    prompt: str,
) -> str:
    """Write Python that builds the stock pipeline, loads the export and generates a video.

    "" if the format is one that Python does not load.

    Args:
        model: Gives the size of the video and the sampling options.
        spec: Names of the model's parts in diffusers.
        format: The format.
        folder: Folder of the export.
        adapted: Names, in the pipeline, of the networks that have the adapter.
        prompt: Prompt of the video.
    """
    merged = isinstance(format, MergedFormat)
    loading = []
    if isinstance(format, AdapterFormat):
        loading = [format.script(folder, spec, name) for name in adapted]
        if not all(loading):
            return ""
    source = _quoted(folder if merged else spec.source)
    if spec.revision and not merged:
        source += f", revision={_quoted(spec.revision)}"
    arguments, classes, method = [source], {spec.pipeline}, "from_pretrained"
    dtype = precision(model.denoiser)
    if spec.file is not None and not merged:
        file = _quoted(spec.file)
        if hasattr(getattr(diffusers, spec.pipeline), "from_single_file"):
            arguments, method = [file, f"config={source}"], "from_single_file"
        else:
            name, network = next(iter(spec.networks.items()))
            code = f"{type(network).__name__}.from_single_file({file}, config={source}, "
            arguments.append(f'{name}={code}subfolder="{name}", torch_dtype={dtype})')
            classes.add(type(network).__name__)
    elif spec.variant and not merged:
        arguments.append(f"variant={_quoted(spec.variant)}")
    for key, value in spec.arguments.items():
        if not merged or "{source}" in value:
            arguments.append(f"{key}={value.replace('{source}', source)}")
            classes |= set(re.findall(r"(\w+)\.from_(?:pretrained|single_file)", value))
    if dtype is not torch.float32:
        arguments.append(f"torch_dtype={dtype}")
    lines = [f"pipe = {spec.pipeline}.{method}({', '.join(arguments)})"]
    if not merged and (scheduler := _scheduler_line(spec)):
        lines.append(f"pipe.scheduler = {scheduler}")
        classes.add(type(spec.scheduler).__name__)
    lines += loading
    if model.device.type != "cpu":
        lines.append(f"pipe.to({_quoted(model.device.type)})")
    shape = model.shape
    call = {
        "num_frames": shape.frames,
        "height": shape.height,
        "width": shape.width,
        "num_inference_steps": model.sampling.num_inference_steps,
        "guidance_scale": model.sampling.guidance_scale,
        **spec.call,
    }
    options = ", ".join(f"{key}={value!r}" for key, value in call.items())
    lines.append(
        f"video = pipe({_quoted(prompt)}, {options}, generator=torch.Generator().manual_seed(0))"
        ".frames[0]"
    )
    heads = ["import torch", f"from diffusers import {', '.join(sorted(classes))}"]
    if isinstance(format, AdapterFormat):
        heads += format.imports
    return "\n".join([*heads, *lines])


def _scheduler_line(spec: ExportSpec) -> str:
    """Expression for the run's scheduler; empty if the checkpoint has the same one."""
    ours = spec.scheduler
    text = (spec.folder("scheduler") / "scheduler_config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    plain = type(ours).from_config(theirs.config).config
    changed = {
        key: value
        for key, value in ours.config.items()
        if not key.startswith("_") and plain.get(key) != value
    }
    if type(ours) is type(theirs) and not changed:
        return ""
    options = "".join(f", {key}={value!r}" for key, value in changed.items())
    return f"{type(ours).__name__}.from_config(pipe.scheduler.config{options})"


def _quoted(text: str | Path) -> str:
    return json.dumps(str(text), ensure_ascii=False)


def _on_hub(spec: ExportSpec) -> bool:
    source = spec.source
    return spec.file is None and is_hub_id(source) and not Path(source).is_dir()


def _unusual(tables: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Other strategies of the training than the usual ones."""
    usual = {"timesteps": "family", "optimizer": "adamw", "schedule": "linear"}
    names = {kind: tables.get(kind, {}).get("name", name) for kind, name in usual.items()}
    listeners = ", ".join(short_name(name) for name in tables.get("listener", {}))
    return [
        *((kind, short_name(name)) for kind, name in names.items() if name != usual[kind]),
        *([("listeners", listeners)] if listeners else []),
    ]


def _settings(summary: RunSummary, spec: ExportSpec) -> list[tuple[str, str]]:
    tables = summary.tables
    train, run = tables["train"], tables["run"]
    local = "tiny, in the package" if _embedded(summary) else Path(spec.file or spec.source).name
    base = spec.source if _on_hub(spec) else local
    loss = ", ".join(f"{key} {v}" for key, v in tables["loss"].items() if key != "name")
    per_step = train["batch_size"] * train["gradient_accumulation_steps"]
    return [
        ("backbone", short_name(tables["backbone"]["name"])),
        ("base model", base + (f" at {spec.revision}" if spec.revision else "")),
        *_quantization(tables.get("memory", {}).get("quantization", "native")),
        ("pairs", summary.pairs),
        ("labels", ", ".join(train.get("labels", ())) or "those stored with the pairs"),
        ("loss", f"{short_name(tables['loss']['name'])} ({loss})"),
        ("reference", short_name(tables["reference"]["name"])),
        *_unusual(tables),
        ("LoRA", f"rank {train['rank']}, alpha {train['alpha']:g}{_options(train)}"),
        ("learning rate", f"{train['learning_rate']:g}"),
        ("steps", f"{summary.step} of {train['steps']}, {counted(per_step, 'pair')} each"),
        ("seed", str(run["seed"])),
        ("precision", train["mixed_precision"]),
        ("versions", ", ".join(f"{name} {number}" for name, number in summary.versions.items())),
    ]


def _options(train: Mapping[str, Any]) -> str:
    """Where the adapter started, and its further options."""
    start = train.get("init_from")
    text = (
        f", started from {Path(start).name if Path(start).is_absolute() else start}"
        if start
        else ""
    )
    return text + "".join(f", {name} {value}" for name, value in train.get("lora", {}).items())


def _quantization(kind: str) -> list[tuple[str, str]]:
    return [] if kind == "native" else [("quantization", f"base weights in {kind} during training")]


def _scores(evaluation: Evaluation) -> list[dict[str, str]]:
    rows = []
    for metric in evaluation.metrics:
        wanted = "higher" if metric.higher_is_better else "lower"
        rows.append(_score(metric.label, wanted, metric))
        if metric.witness is not None:
            rows.append(_score(f"by {metric.witness.name}", "", metric.witness))
    return rows


def _score(label: str, wanted: str, change: Change) -> dict[str, str]:
    base, tuned = apart(change.difference.base_mean, change.difference.tuned_mean)
    return {
        "metric": label,
        "wanted": wanted,
        "base": base,
        "tuned": tuned,
        "interval": change.interval_text,
    }


def _measured(summary: RunSummary) -> str:
    """Note on the evaluated checkpoint, if it is another one."""
    if summary.evaluation is None:
        return ""
    measured = summary.evaluation.facts.get("Checkpoint", summary.checkpoint)
    return "" if measured == summary.checkpoint else f"measured on another checkpoint, {measured}"


def _embedded(summary: RunSummary) -> bool:
    table = summary.tables["backbone"]
    return table["name"] == "tiny" and "model" not in table


def _local(summary: RunSummary) -> str:
    embedded = "`tiny`, the model that ships with `dpo-video`"
    return embedded if _embedded(summary) else "a local checkpoint"


def _licence(base: str | None, summary: RunSummary) -> str:
    if base is None and _embedded(summary):
        return "It is derived from `tiny`, whose licence is that of `dpo-video`."
    if base is None:
        return (
            "It is derived from a local checkpoint, whose licence applies. Name that licence here "
            "before you publish it."
        )
    return (
        f"It is derived from [{base}](https://huggingface.co/{base}), whose licence applies, "
        "including its terms of use and redistribution. The licence of the training videos may "
        "apply too."
    )


def _without_paths(value: Any) -> Any:
    """Settings in which every absolute path is reduced to its last part."""
    if isinstance(value, Mapping):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(part) for part in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
