"""`dpo-video estimate` as the shell runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import SHAPE
from typer.testing import CliRunner

from dpo_video.cli import app
from dpo_video.cli.estimate import DOES_NOT_FIT, predict
from dpo_video.estimation.forecast import Forecast, MemoryMode, TraceCache, candidate_modes
from dpo_video.strategies import Loss
from dpo_video.workflows.config import Config


@pytest.fixture(scope="module")
def predicted() -> dict[str, Forecast]:
    """What was predicted once; the tests ask about one configuration."""
    return {}


@pytest.fixture
def arguments(
    small_folder: Path, predicted: dict[str, Forecast], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    def once(config: Config, *, traces: TraceCache, card: object = None) -> Forecast:
        if "all" not in predicted:
            predicted["all"] = predict(config, traces=traces)
        return predicted["all"]

    def ends(references: Sequence[str], loss: Loss) -> list[MemoryMode]:
        modes = candidate_modes(references, loss)
        return [*modes[:3], modes[4], *modes[-2:]]  # [4]: all blocks, what auto falls back to

    monkeypatch.setattr("dpo_video.estimation.forecast.ladder", ends)
    monkeypatch.setattr("dpo_video.cli.estimate.predict", once)
    monkeypatch.setenv("COLUMNS", "200")
    return [
        "estimate", "--backbone=animatediff", f"--set=backbone.model={small_folder}", "--tier=t4",
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
    asked = {"reference": "toggle", "checkpointing": "none", "backward": "joint", "chunks": 1,
             "offload": [], "base": "native", "shard": 1}  # fmt: skip
    assert found["asked"] == asked
    assert {need["mode"]["base"] for need in found["needs"]} == {"native", "nf4"}
    assert any(need["host"] for need in found["needs"])
    assert found["recommended"]["checkpointing"] == "none"
    assert {need["mode"]["reference"] for need in found["needs"]} == {"toggle", "copy", "cached"}
    for need in found["needs"]:
        assert need["fits"]["h100"] and need["hours"]["h100"] < need["hours"]["t4"]


def test_what_does_not_fit_the_card_is_exit_code_3(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_video.estimation.forecast.CONTEXT", 1e12)
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == DOES_NOT_FIT == 3
    words = " ".join(done.stdout.split())
    assert "does not fit NVIDIA T4" in words and "nothing was measured" in words
    assert "No mode does. Lower backbone.frames" in words
    lines = done.stdout.splitlines()
    (head,) = (line for line in lines if line.startswith("mode "))
    assert head.split() == ["mode", "GiB", "host", "TFLOP", "h", "(t4)", "fits", "from"]
    assert any(line.startswith("toggle blocks split /8 host:cob ") for line in lines)
    assert max(map(len, lines)) <= 80


def test_it_says_that_a_compiled_step_is_not_predicted(arguments: list[str]) -> None:
    told = "Predicted without memory.compile"
    compiled = CliRunner().invoke(app, [*arguments, "--set=memory.compile=on"])
    assert compiled.exit_code == 0 and told in compiled.stdout
    assert told not in CliRunner().invoke(app, arguments).stdout
