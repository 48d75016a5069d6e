"""`dpo-video fit` as the shell runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SHAPE
from typer.testing import CliRunner

from dpo_video.cli import app


@pytest.fixture
def arguments(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "200")
    return [
        "fit", "--backbone=animatediff", f"--set=backbone.model={small_folder}", "--tier=t4",
        f"--set=backbone.frames={SHAPE.frames}", f"--set=backbone.height={SHAPE.height}",
        f"--set=backbone.width={SHAPE.width}", "--set=train.rank=2",
    ]  # fmt: skip


def test_it_says_in_json_what_every_mode_needs_and_which_card_holds_it(
    arguments: list[str],
) -> None:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert found["predicted"] is True and found["tier"] == "t4" and found["fits"] is True
    assert found["asked"] == {"reference": "toggle", "checkpointing": "blocks", "backward": "split"}
    assert found["recommended"]["checkpointing"] == "none"
    assert {need["mode"]["reference"] for need in found["needs"]} == {"toggle", "copy", "cached"}
    for need in found["needs"]:
        assert need["fits"]["h100"] and need["hours"]["h100"] < need["hours"]["t4"]
