from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import SHAPE
from safetensors.torch import load_file, save_file
from small_training import make_store
from typer.testing import CliRunner

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.cli import app
from dpo_video.errors import StoreError


def test_the_exit_code_is_1_for_a_problem(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "pairs", small_model)
    arguments = [
        "check", str(store.folder), "--json", "--device=cpu", "--backbone=animatediff",
        f"--set=backbone.model={small_folder}", f"--set=backbone.frames={SHAPE.frames}",
        f"--set=backbone.height={SHAPE.height}", f"--set=backbone.width={SHAPE.width}",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["pairs"] == 5
    assert {finding["level"] for finding in found["findings"]} <= {"fine", "notice", "unknown"}

    some = [*arguments, "--check=prompts", "--check=+leakage", "--set=check.leakage.share=0.9"]
    chosen = json.loads(CliRunner().invoke(app, some).stdout)["findings"]
    assert [finding["check"] for finding in chosen] == ["prompts", "leakage"]
    path = store.folder / "latents" / "00002.safetensors"
    tensors = load_file(path)
    tensors["first"][0, 0] = float("nan")
    save_file(tensors, path)
    arguments.remove("--json")
    done = CliRunner().invoke(app, arguments)
    assert "does not hold what was written" in str(done.exception)
    index = store.folder / "pairs.jsonl"  # as of a store without hashes
    index.write_text(re.sub('"latents_hash":"[0-9a-f]*"', '"latents_hash":""', index.read_text()))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "1 of 5 pairs hold nan or infinity (00002)" in " ".join(done.stdout.split())
    assert "1 problem," in done.stdout


def test_a_folder_without_pairs_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a pair store"):
        CliRunner().invoke(app, ["check", str(tmp_path)], catch_exceptions=False)
