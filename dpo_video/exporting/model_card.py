"""The model card of an export: what it is, how it is loaded, how it was trained, what it does."""

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

from dpo_video.evaluation.results import Evaluation
from dpo_video.exporting.lora_formats import DIFFUSERS_FILE, load_options, precision, subfolder
from dpo_video.strategies import VideoModel
from dpo_video.support.formatting import brief, percent
from dpo_video.training.diagnosis import TrainingVerdict
from dpo_video.types import ExportSpec

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What is known of a run."""

    name: str
    tables: Mapping[str, Any]
    """Of its run.toml."""
    versions: Mapping[str, str]
    pairs: str
    """How many there were and what they were made of, in words."""
    checkpoint: str
    """The checkpoint's name."""
    step: int
    """How many steps it had then."""
    verdict: TrainingVerdict | None
    evaluation: Evaluation | None


def model_card(
    story: RunSummary,
    publication: ExportSpec,
    *,
    format: str,
    script: str,
    change: float,
    difference: float,
) -> str:
    """README.md, in Markdown with the hub's header.

    Args:
        story: What is known of the run.
        publication: How the model is called outside.
        format: One of `dpo_video.exporting.export.Format`.
        script: The Python that loads it; empty for ComfyUI.
        change: What the adapter changes in predictions, relative to them.
        difference: How far the exported one's predictions were off, relative to them.
    """
    merged = format == "merged"
    base = publication.source if _on_hub(publication) else None
    environment = Environment(
        loader=PackageLoader("dpo_video.exporting"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, and _cell keeps its tables whole
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md.j2").render(
        base_model=base,
        base=f"[{base}](https://huggingface.co/{base})" if base else "a local checkpoint",
        merged=merged,
        library="peft" if format == "peft" else "diffusers",
        name=story.name,
        what="A fine-tuned checkpoint" if merged else "A LoRA adapter",
        use=_use(publication, format),
        script=script,
        settings=[(key, _cell(value)) for key, value in _settings(story, publication)],
        verdict=story.verdict,
        evaluation=story.evaluation,
        scores=_scores(story.evaluation) if story.evaluation else [],
        measured=_measured(story),
        change=f"{change:.2g}",
        difference=f"{difference:.2g}",
        licence=_licence(base),
        toml=tomli_w.dumps(_without_paths(story.tables)).strip(),
    )


def loading_script(
    model: VideoModel,
    publication: ExportSpec,
    *,
    format: str,
    folder: Path,
    adapted: Sequence[str],
    prompt: str,
) -> str:
    """Python that makes the stock pipeline, loads the export into it, and draws a video.

    Args:
        model: For its shape and sampling.
        publication: How it is called outside.
        format: "diffusers", "peft" or "merged".
        folder: The export's.
        adapted: The networks that the adapter is on, by the pipeline's names.
        prompt: What the video is to show.
    """
    merged = format == "merged"
    source = _quoted(folder if merged else publication.source)
    if publication.revision and not merged:
        source += f", revision={_quoted(publication.revision)}"
    arguments, classes = [source], {publication.pipeline}
    for key, value in publication.arguments.items():
        if not merged or "{source}" in value:
            arguments.append(f"{key}={value.replace('{source}', source)}")
            classes |= set(re.findall(r"(\w+)\.from_pretrained", value))
    dtype = precision(model.denoiser)
    if dtype is not torch.float32:
        arguments.append(f"torch_dtype={dtype}")
    lines = [f"pipe = {publication.pipeline}.from_pretrained({', '.join(arguments)})"]
    if not merged and (scheduler := _scheduler_line(publication)):
        lines.append(f"pipe.scheduler = {scheduler}")
        classes.add(type(publication.scheduler).__name__)
    for name in () if merged else adapted:
        lines.append(_loading_line(publication, format, folder, name))
    if model.device.type != "cpu":
        lines.append(f"pipe.to({_quoted(model.device.type)})")
    shape = model.shape
    call = {
        "num_frames": shape.frames,
        "height": shape.height,
        "width": shape.width,
        "num_inference_steps": model.sampling.num_inference_steps,
        "guidance_scale": model.sampling.guidance_scale,
        **publication.call,
    }
    said = ", ".join(f"{key}={value!r}" for key, value in call.items())
    lines.append(
        f"video = pipe({_quoted(prompt)}, {said}, generator=torch.Generator().manual_seed(0))"
        ".frames[0]"
    )
    heads = ["import torch", f"from diffusers import {', '.join(sorted(classes))}"]
    if format == "peft":
        heads.append("from peft import PeftModel")
    return "\n".join([*heads, *lines])


def _loading_line(publication: ExportSpec, format: str, folder: Path, name: str) -> str:
    place = _quoted(folder / subfolder(publication, name))
    if format == "peft":
        return f"pipe.{name} = PeftModel.from_pretrained(pipe.{name}, {place})"
    options = "".join(f", {key}={value}" for key, value in load_options(publication, name).items())
    return f'pipe.load_lora_weights({place}, weight_name="{DIFFUSERS_FILE}"{options})'


def _scheduler_line(publication: ExportSpec) -> str:
    """What makes the checkpoint's scheduler the run's; empty if it is already."""
    ours = publication.scheduler
    text = (publication.folder("scheduler") / "scheduler_config.json").read_text(encoding="utf-8")
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
    said = "".join(f", {key}={value!r}" for key, value in changed.items())
    return f"{type(ours).__name__}.from_config(pipe.scheduler.config{said})"


def _use(publication: ExportSpec, format: str) -> str:
    if format == "comfyui":
        text = publication.comfy_place
        if len(publication.networks) > 1:
            first, second = publication.networks
            text += (
                f" The file ending in `-{first}` belongs to the high-noise model, that in "
                f"`-{second}` to the low-noise one."
            )
        return text
    return (
        f"In diffusers' `{publication.pipeline}`"
        + {
            "diffusers": ":",
            "peft": ", through PEFT:",
            "merged": ", and in dpo-video by `--set backbone.model=FOLDER`:",
        }[format]
    )


def _quoted(text: str | Path) -> str:
    return json.dumps(str(text), ensure_ascii=False)


def _on_hub(publication: ExportSpec) -> bool:
    source = publication.source
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).is_dir()


def _settings(story: RunSummary, publication: ExportSpec) -> list[tuple[str, str]]:
    tables = story.tables
    train, run = tables["train"], tables["run"]
    base = publication.source if _on_hub(publication) else Path(publication.source).name
    loss = {key: value for key, value in tables["loss"].items() if key != "name"}
    per_step = train["batch"] * train["accumulation"]
    return [
        ("backbone", tables["backbone"]["name"]),
        ("base model", base + (f" at {publication.revision}" if publication.revision else "")),
        *_packed(tables.get("memory", {}).get("base", "native")),
        ("pairs", story.pairs),
        ("labels", ", ".join(train.get("labels", ())) or "the pairs' own"),
        ("loss", f"{tables['loss']['name']} ({', '.join(f'{k} {v}' for k, v in loss.items())})"),
        ("reference", tables["reference"]["name"]),
        ("LoRA", f"rank {train['rank']}, alpha {train['alpha']:g}"),
        ("learning rate", f"{train['lr']:g}"),
        ("steps", f"{story.step} of {train['steps']}, of {per_step} pairs each"),
        ("seed", str(run["seed"])),
        ("precision", train["precision"]),
        ("versions", ", ".join(f"{name} {number}" for name, number in story.versions.items())),
    ]


def _packed(base: str) -> list[tuple[str, str]]:
    if base == "native":
        return []
    return [("trained on", f"the base's weights in {base}, not as they are published")]


def _scores(evaluation: Evaluation) -> list[dict[str, str]]:
    rows = []
    for metric in evaluation.metrics:
        change = metric.difference
        relative = change.relative is not None
        rows.append(
            {
                "metric": metric.label,
                "wanted": "higher" if metric.higher_is_better else "lower",
                "base": brief(change.base_mean),
                "tuned": brief(change.tuned_mean),
                "interval": f"{percent(change.relative_low)} to {percent(change.relative_high)}"
                if relative
                else f"{brief(change.low)} to {brief(change.high)}",
            }
        )
    return rows


def _measured(story: RunSummary) -> str:
    """Which checkpoint was evaluated, if it is another one."""
    if story.evaluation is None:
        return ""
    measured = story.evaluation.facts.get("Checkpoint", story.checkpoint)
    return "" if measured == story.checkpoint else f"of another checkpoint, {measured}"


def _licence(base: str | None) -> str:
    if base is None:
        return (
            "It was made of a local checkpoint, whose licence applies to it; put that licence's "
            "name here before you publish it."
        )
    return (
        f"It was made of [{base}](https://huggingface.co/{base}), whose licence applies to it, "
        "with what that says about use and about passing it on. So may the licence of the videos "
        "that it was trained on."
    )


def _without_paths(value: Any) -> Any:
    """Settings with the last part of every path on somebody's disk only."""
    if isinstance(value, Mapping):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(part) for part in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
