"""The fewest checkpointed blocks that fit are chosen and recorded in run.toml."""

from __future__ import annotations

import tomllib
from functools import partial

import pytest
import torch
from small_cogvideox import OPTIONS, save_small_cogvideox

from dpo_video.backbone.cogvideox import CogVideoX
from dpo_video.errors import UserError
from dpo_video.estimation.estimate import estimate_memory
from dpo_video.estimation.fewest_blocks import BUDGET_SHARE, _guess, fewest_blocks
from dpo_video.estimation.modes import Checkpointing, MemoryMode
from dpo_video.estimation.results import GIB, MemoryEstimate
from dpo_video.estimation.tiers import find_tier
from dpo_video.estimation.tracing import TraceCache
from dpo_video.loss.global_ import Global
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import Backbone
from dpo_video.workflows.config import Config, resolve
from dpo_video.workflows.estimate import choose_blocks, predict
from dpo_video.workflows.progress import Progress

SETTINGS = TrainSettings(rank=2, alpha=4, gradient_accumulation_steps=1)
MODE = MemoryMode(reference="toggle", checkpointing="blocks", backward="joint")


class Setup:
    """A small model, the estimate of its step with any number of blocks, and the choice."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.traces = TraceCache()
        arguments = self.backbone, Toggle(), Global(), SETTINGS
        self.choose = partial(fewest_blocks, *arguments, traces=self.traces)

    def estimate(self, count: Checkpointing, mode: MemoryMode = MODE) -> MemoryEstimate:
        asked = mode.model_copy(update={"checkpointing": count})
        found = estimate_memory(
            self.backbone, {"toggle": Toggle()}, Global(), SETTINGS, modes=[asked],
            traces=self.traces,
        )  # fmt: skip
        return found.estimates[0]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Five blocks."""
    folder = save_small_cogvideox(tmp_path_factory.mktemp("five"), num_layers=5)
    return Setup(CogVideoX(model=str(folder), **{**OPTIONS, "height": 64, "width": 64}))


def test_the_choice_fits_and_one_block_fewer_does_not(setup: Setup) -> None:
    most, least = setup.estimate("none"), setup.estimate("blocks")
    budget = least.total + 0.3 * (most.total - least.total)
    choice = setup.choose(MODE, budget)
    count = choice.estimate.mode.checkpointing
    assert isinstance(count, int) and 1 < count < choice.blocks == 5
    assert choice.estimate.total <= budget < setup.estimate(count - 1).total
    assert choice.estimate == setup.estimate(count)
    assert f"{count} of 5 blocks" in str(choice) and "more operations" in str(choice)


def test_the_choice_is_none_or_all_blocks_or_an_error_at_the_ends(setup: Setup) -> None:
    most, least = setup.estimate("none").total, setup.estimate("blocks").total
    assert setup.choose(MODE, most).estimate.mode.checkpointing == "none"
    assert setup.choose(MODE, most - 1).estimate.mode.checkpointing == 1
    assert setup.choose(MODE, least).estimate.mode.checkpointing == "blocks"
    with pytest.raises(
        UserError, match=r"with all 5 blocks.*Set one or more of memory\.backward=split, .*=8, "
    ):
        setup.choose(MODE, least - 1)


@pytest.mark.parametrize("left", [0.98, 0.8, 0.5])
@pytest.mark.parametrize("budget", [0.999, 0.3, 0.11, 0.02])
def test_the_first_guess_is_right_if_each_block_saves_the_same_fraction(
    left: float, budget: float
) -> None:
    few, enough = 3, 40
    while left ** (enough - few - 1) > budget:
        enough += 7
    right = next(count for count in range(few + 1, enough) if left ** (count - few) <= budget)
    guess = _guess(few, enough, 1 / budget, left ** (enough - few) / budget)
    assert guess == right


@pytest.mark.parametrize("above", [1 + 1e-12, 2.0, 1e6])
@pytest.mark.parametrize("below", [1.0, 1 - 1e-12, 1e-6])
@pytest.mark.parametrize("enough", [2, 3, 60])
def test_a_guess_lies_between_the_counts_tried(above: float, below: float, enough: int) -> None:
    assert 0 < _guess(0, enough, above, below) < enough


def test_offloaded_checkpoints_need_a_checkpointed_block(setup: Setup) -> None:
    mode = MODE.model_copy(update={"offload": ("checkpoints",)})
    assert setup.choose(mode, 1e15).estimate.mode.checkpointing == 1


@pytest.mark.parametrize("value", ["some", -1, True, 1.5])
def test_checkpointing_takes_whole_numbers_only(value: object) -> None:
    with pytest.raises(ValueError, match="must be none, blocks, auto or a number of blocks"):
        MemorySettings.model_validate({"checkpointing": value})
    assert MemorySettings(checkpointing=0) == MemorySettings()
    assert MemorySettings.model_validate({"budget": "auto"}).budget is None


# --- commands --------------------------------------------------------------------------------


class Notes(Progress):
    """Keeps the notes of a workflow."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str, *, warning: bool = False) -> None:
        self.texts.append(text)


def configured(setup: Setup, *assignments: str) -> Config:
    options = [f"backbone.{name}={value}" for name, value in setup.backbone if value is not None]
    return resolve(
        choices={"backbone": "cogvideox", "loss": "global"},
        assignments=[
            *options,
            "train.rank=2",
            "train.gradient_accumulation_steps=1",
            "memory.checkpointing=auto",
            *assignments,
        ],
    )


def test_a_run_records_the_chosen_number(setup: Setup) -> None:
    budget = setup.estimate(1).total / GIB
    notes = Notes()
    resolved = choose_blocks(configured(setup, f"memory.budget={budget}"), progress=notes)
    assert resolved.memory.checkpointing == 1
    announced, chosen = notes.texts[:2]
    assert "takes seconds for small models" in announced
    assert "Checkpointing 1 of 5 blocks" in chosen
    written = tomllib.loads(resolved.toml())["memory"]
    assert MemorySettings(**written) == resolved.memory
    assert choose_blocks(resolved) is resolved


def test_estimate_shows_the_fewest_blocks_that_fit_a_card(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [MODE.model_copy(update={"checkpointing": count}) for count in ("none", "blocks")]
    monkeypatch.setattr("dpo_video.estimation.modes.candidate_modes", lambda references, loss: ends)
    config = configured(setup)
    memory = setup.estimate(3).total / BUDGET_SHARE / GIB
    card = find_tier("t4").model_copy(update={"memory_gib": memory})
    rows = predict(config, card=card).estimates
    assert [need.mode.checkpointing for need in rows] == ["none", 3, "blocks"]


def test_auto_checkpointing_needs_a_budget_without_a_gpu(setup: Setup) -> None:
    with pytest.raises(UserError, match=r"no budget on the device cpu\. Set memory\.budget=GIB"):
        choose_blocks(configured(setup), device=torch.device("cpu"))
