"""The command `dpo-video estimate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import SHAPE
from typer.testing import CliRunner

from dpo_video.cli import app
from dpo_video.cli.estimate import DOES_NOT_FIT
from dpo_video.errors import UserError
from dpo_video.estimation.modes import MemoryMode, candidate_modes
from dpo_video.estimation.results import Estimate
from dpo_video.estimation.tiers import Tier
from dpo_video.estimation.tracing import TraceCache
from dpo_video.strategies import Loss
from dpo_video.workflows.config import Config
from dpo_video.workflows.estimate import mode_of, predict


@pytest.fixture(scope="module")
def predicted() -> dict[str, Estimate]:
    """The prediction, made once: all tests use one configuration."""
    return {}


@pytest.fixture
def arguments(
    small_folder: Path, predicted: dict[str, Estimate], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    def once(config: Config, *, traces: TraceCache, card: Tier | None = None) -> Estimate:
        if "all" not in predicted:
            predicted["all"] = predict(config, traces=traces)
        return predicted["all"].model_copy(update={"tier": card, "asked": mode_of(config)})

    def ends(references: Sequence[str], loss: Loss) -> list[MemoryMode]:
        modes = candidate_modes(references, loss)
        return [*modes[:3], modes[4], *modes[-2:]]  # [4]: all blocks, what auto falls back to

    monkeypatch.setattr("dpo_video.estimation.modes.CHUNKS", 2)  # fewer operations
    monkeypatch.setattr("dpo_video.estimation.modes.candidate_modes", ends)
    monkeypatch.setattr("dpo_video.workflows.estimate.predict", once)
    monkeypatch.setenv("COLUMNS", "200")
    return [
        "estimate", "--backbone=animatediff", f"--set=backbone.model={small_folder}", "--tier=t4",
        f"--set=backbone.frames={SHAPE.frames}", f"--set=backbone.height={SHAPE.height}",
        f"--set=backbone.width={SHAPE.width}", "--set=train.rank=2",
    ]  # fmt: skip


def test_json_has_the_memory_of_every_mode_and_the_cards_that_hold_it(
    arguments: list[str],
) -> None:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert found["predicted"] is True and found["tier"] == "t4" and found["fits"] is True
    asked = {"reference": "toggle", "checkpointing": "none", "backward": "joint",
             "forward_chunks": 1, "offload": [], "quantization": "native", "shard": 1}  # fmt: skip
    assert found["asked"] == asked
    assert {need["mode"]["quantization"] for need in found["estimates"]} == {"native", "nf4"}
    assert any(need["host"] for need in found["estimates"])
    assert found["recommended"]["checkpointing"] == "none"
    assert {need["mode"]["reference"] for need in found["estimates"]} == {
        "toggle",
        "copy",
        "cached",
    }
    for need in found["estimates"]:
        assert need["fits"]["h100"] and need["hours"]["h100"] < need["hours"]["t4"]


def test_a_mode_that_does_not_fit_the_card_exits_with_3(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_video.estimation.results.CONTEXT", 1e12)
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == DOES_NOT_FIT == 3
    words = " ".join(done.stdout.split())
    assert "does not fit NVIDIA T4" in words and "nothing was measured" in words
    assert "No mode fits. Lower backbone.frames" in words
    lines = done.stdout.splitlines()
    (head,) = (line for line in lines if line.startswith("mode "))
    assert head.split() == ["mode", "GiB", "CPU", "TFLOP", "h", "(t4)", "fits", "from"]
    assert any(line.startswith("toggle blocks split /2 cpu:cob ") for line in lines)
    rows = lines[lines.index(head) :]
    assert max(len(line) for line in rows if "  " in line) <= 80  # the terminal wraps text


def test_a_compiled_step_is_predicted_without_compile_and_says_so(arguments: list[str]) -> None:
    told = "Predicted without memory.compile"
    arguments = [*arguments, "--set=memory.checkpointing=none"]
    compiled = CliRunner().invoke(app, [*arguments, "--set=memory.compile=on"])
    assert compiled.exit_code == 0 and told in compiled.stdout
    assert told not in CliRunner().invoke(app, arguments).stdout


@pytest.mark.parametrize("other", ["memory.offload=blocks", "memory.quantization=int8"])
def test_modes_that_do_not_combine_are_refused_as_by_train(
    arguments: list[str], other: str
) -> None:
    found = CliRunner().invoke(app, [*arguments, "--set=memory.compile=on", f"--set={other}"])
    assert isinstance(found.exception, UserError)
    assert "Set memory.compile=off, or leave those out" in str(found.exception)
