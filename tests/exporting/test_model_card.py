"""The model card: its header, and what must stay out of it."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_evaluation import an_evaluation, with_witness
from torch import nn

from dpo_video import registry
from dpo_video.exporting.model_card import RunSummary, model_card
from dpo_video.types import ExportSpec
from dpo_video.workflows import config

TABLES = config.resolve(assignments=["run.clips=/home/somebody/films", "loss.beta=7"]).tables
SUMMARY = RunSummary(
    name="mine",
    tables=TABLES,
    versions={"torch": "2.13"},
    pairs="50 a|b",
    checkpoint="step_000050",
    step=50,
    verdict=None,
    evaluation=None,
)
SPEC = ExportSpec(
    pipeline="WanPipeline",
    source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    revision="abc123",
    networks={"transformer": nn.Linear(1, 1)},
    scheduler=None,
    index={},
    folder=lambda part: Path(part),
    copy=lambda part, target: None,
    comfy=lambda module: None,
    comfy_usage="Here.",
)

DIFFUSERS = registry.strategy("format", "diffusers")


def card(**options: Any) -> str:
    given: dict[str, Any] = {"format": DIFFUSERS, "script": "", "change": 0.5, "difference": 0.0}
    spec = options.pop("spec", SPEC)
    return model_card(SUMMARY, spec, **{**given, **options})


@pytest.mark.parametrize(
    ("format", "library", "relation", "tag"),
    [
        ("diffusers", "diffusers", "adapter", "lora"),
        ("peft", "peft", "adapter", "lora"),
        ("merged", "diffusers", "finetune", "diffusers"),
    ],
)
def test_the_header_names_the_base_model(
    format: str, library: str, relation: str, tag: str
) -> None:
    _, head, body = card(format=registry.strategy("format", format)).split("---\n", 2)
    assert head.splitlines() == [
        'base_model: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"',
        f"base_model_relation: {relation}",
        f"library_name: {library}",
        "pipeline_tag: text-to-video",
        "tags:",
        "- text-to-video",
        "- dpo",
        f"- {tag}",
    ]
    assert "| base model | Wan-AI/Wan2.1-T2V-1.3B-Diffusers at abc123 |" in body
    assert "](https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B-Diffusers), whose licence" in body


def test_a_local_folder_is_not_named_as_a_hub_model(tmp_path: Path) -> None:
    text = card(spec=replace(SPEC, source=str(tmp_path)))
    assert "base_model" not in text and str(tmp_path) not in text


def test_absolute_paths_are_left_out_and_cells_are_escaped() -> None:
    text = card()
    assert "/home/somebody" not in text
    settings = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    assert settings["run"]["clips"] == "films" and settings["loss"]["beta"] == 7
    assert "| pairs | 50 a\\|b |" in text


def test_a_missing_log_and_evaluation_are_stated() -> None:
    text = card()
    assert "The training log is missing." in text and "It has not been evaluated." in text


def test_the_card_of_the_embedded_model_names_it_and_its_licence(tmp_path: Path) -> None:
    summary = replace(SUMMARY, tables={**TABLES, "backbone": {"name": "tiny"}})
    spec = replace(SPEC, source=str(tmp_path / "weights"), revision=None)
    text = model_card(summary, spec, format=DIFFUSERS, script="", change=0.5, difference=0.0)
    assert "A LoRA adapter of `tiny`" in text and "licence is that of `dpo-video`" in text
    assert "local checkpoint" not in text and str(tmp_path) not in text


def test_the_card_shows_the_second_measurement() -> None:
    evaluation = an_evaluation([f"prompt {i}" for i in range(16)])
    warp = with_witness(evaluation.metrics[0], 3.0)
    assert warp.witness is not None and warp.disagreement
    evaluation = evaluation.model_copy(update={"metrics": (warp,)})
    summary = replace(SUMMARY, evaluation=evaluation)
    text = model_card(summary, SPEC, format=DIFFUSERS, script="", change=0.5, difference=0.0)
    (line,) = (line for line in text.splitlines() if line.startswith("| by DIS |"))
    assert line.endswith(f"| {warp.witness.interval_text} |")
    assert f"\n\n{warp.disagreement}\n\nThe export" in text


def test_the_card_tells_the_files_of_two_networks_apart() -> None:
    networks = {"transformer": nn.Linear(1, 1), "transformer_2": nn.Linear(1, 1)}
    text = card(
        format=registry.strategy("format", "comfyui"), spec=replace(SPEC, networks=networks)
    )
    assert "`-transformer` is for the high-noise model, the file ending in `-transformer_2`" in text


def test_the_card_names_unusual_strategies_of_the_training() -> None:
    assert "| schedule |" not in card() and "| listeners |" not in card()
    tables = {
        **SUMMARY.tables,
        "timesteps": {"name": "code/mine-0123456789ab.py:Late"},
        "schedule": {"name": "linear"},
        "listener": {"early_stop": {}},
    }
    text = model_card(
        replace(SUMMARY, tables=tables), SPEC, format=DIFFUSERS, script="", change=0.5,
        difference=0.0,
    )  # fmt: skip
    assert "| timesteps | Late |" in text and "| listeners | early_stop |" in text
    assert "| schedule |" not in text
