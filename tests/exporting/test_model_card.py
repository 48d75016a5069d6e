"""The model card's header, and what must not get into it."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dpo_video.exporting.model_card import RunSummary, model_card
from dpo_video.types import ExportSpec
from dpo_video.workflows import config

TABLES = config.resolve(assignments=["run.clips=/home/somebody/films", "loss.beta=7"]).tables
STORY = RunSummary(
    name="mine",
    tables=TABLES,
    versions={"torch": "2.13"},
    pairs="50 a|b",
    checkpoint="step_000050",
    step=50,
    verdict=None,
    evaluation=None,
)
PUBLICATION = ExportSpec(
    pipeline="WanPipeline",
    source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    revision="abc123",
    networks={"transformer": nn.Linear(1, 1)},
    scheduler=None,
    index={},
    folder=lambda part: Path(part),
    comfy=lambda module: None,
    comfy_place="Here.",
)


def card(**options: Any) -> str:
    given: dict[str, Any] = {"format": "diffusers", "script": "", "change": 0.5, "difference": 0.0}
    publication = options.pop("publication", PUBLICATION)
    return model_card(STORY, publication, **{**given, **options})


@pytest.mark.parametrize(
    ("format", "library", "relation", "tag"),
    [
        ("diffusers", "diffusers", "adapter", "lora"),
        ("peft", "peft", "adapter", "lora"),
        ("merged", "diffusers", "finetune", "diffusers"),
    ],
)
def test_the_header_says_what_it_is_made_of(
    format: str, library: str, relation: str, tag: str
) -> None:
    _, head, body = card(format=format).split("---\n", 2)
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


def test_a_folder_is_no_base_on_the_hub(tmp_path: Path) -> None:
    text = card(publication=replace(PUBLICATION, source=str(tmp_path)))
    assert "base_model" not in text and str(tmp_path) not in text


def test_nobodys_folders_are_in_it_and_tables_stay_whole() -> None:
    text = card()
    assert "/home/somebody" not in text
    settings = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    assert settings["run"]["clips"] == "films" and settings["loss"]["beta"] == 7
    assert "| pairs | 50 a\\|b |" in text


def test_what_is_not_known_is_said() -> None:
    text = card()
    assert "There is no log of the training." in text and "It has not been evaluated." in text


def test_two_networks_say_which_file_is_whose() -> None:
    networks = {"transformer": nn.Linear(1, 1), "transformer_2": nn.Linear(1, 1)}
    text = card(format="comfyui", publication=replace(PUBLICATION, networks=networks))
    assert "`-transformer` belongs to the high-noise model, that in `-transformer_2`" in text
