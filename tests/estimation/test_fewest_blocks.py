"""The fewest checkpointed blocks that fit are chosen, and written down."""

from __future__ import annotations

import tomllib
from functools import partial

import pytest
import torch
from small_cogvideox import OPTIONS, save_small_cogvideox

from dpo_video.backbone.cogvideox import CogVideoX
from dpo_video.cli.estimate import choose_blocks, predict
from dpo_video.errors import UserError
from dpo_video.estimation.fewest_blocks import SHARE, _guess, fewest_blocks
from dpo_video.estimation.forecast import (
    GIB,
    Checkpointing,
    MemoryEstimate,
    MemoryMode,
    TraceCache,
    forecast,
)
from dpo_video.estimation.tiers import find_tier
from dpo_video.loss.global_ import Global
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import Backbone
from dpo_video.workflows.config import Config, resolve

SETTINGS = TrainSettings(rank=2, alpha=4, gradient_accumulation_steps=1)
MODE = MemoryMode(reference="toggle", checkpointing="blocks", backward="joint")


class Bench:
    """A small model, what its step needs with any number of blocks, and the choice among them."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.ran = TraceCache()
        what = self.backbone, Toggle(), Global(), SETTINGS
        self.choose = partial(fewest_blocks, *what, traces=self.ran)

    def need(self, count: Checkpointing, mode: MemoryMode = MODE) -> MemoryEstimate:
        asked = mode.model_copy(update={"checkpointing": count})
        found = forecast(
            self.backbone, {"toggle": Toggle()}, Global(), SETTINGS, modes=[asked],
            traces=self.ran,
        )  # fmt: skip
        return found.needs[0]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Five blocks."""
    folder = save_small_cogvideox(tmp_path_factory.mktemp("five"), num_layers=5)
    return Bench(CogVideoX(model=str(folder), **{**OPTIONS, "height": 64, "width": 64}))


def test_what_is_chosen_fits_and_one_block_less_does_not(bench: Bench) -> None:
    most, least = bench.need("none"), bench.need("blocks")
    budget = least.card + 0.3 * (most.card - least.card)
    choice = bench.choose(MODE, budget)
    count = choice.need.mode.checkpointing
    assert isinstance(count, int) and 1 < count < choice.blocks == 5
    assert choice.need.card <= budget < bench.need(count - 1).card
    assert choice.need == bench.need(count)
    assert f"{count} of 5 blocks" in str(choice) and "more operations" in str(choice)


def test_none_all_or_a_refusal_where_no_number_between_is_right(bench: Bench) -> None:
    most, least = bench.need("none").card, bench.need("blocks").card
    assert bench.choose(MODE, most).need.mode.checkpointing == "none"
    assert bench.choose(MODE, most - 1).need.mode.checkpointing == 1
    assert bench.choose(MODE, least).need.mode.checkpointing == "blocks"
    with pytest.raises(UserError, match=r"with all 5 blocks.*Set memory\.backward=split, .*=8, "):
        bench.choose(MODE, least - 1)


@pytest.mark.parametrize("left", [0.98, 0.8, 0.5])
@pytest.mark.parametrize("budget", [0.999, 0.3, 0.11, 0.02])
def test_where_each_block_takes_the_same_share_the_first_guess_is_right(
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
def test_a_guess_is_always_a_number_that_was_not_tried(
    above: float, below: float, enough: int
) -> None:
    assert 0 < _guess(0, enough, above, below) < enough


def test_what_waits_on_the_host_is_of_a_checkpointed_block(bench: Bench) -> None:
    mode = MODE.model_copy(update={"offload": ("checkpoints",)})
    assert bench.choose(mode, 1e15).need.mode.checkpointing == 1


@pytest.mark.parametrize("value", ["some", -1, True, 1.5])
def test_a_number_of_blocks_is_a_whole_one(value: object) -> None:
    with pytest.raises(ValueError, match="must be none, blocks, auto or a number of blocks"):
        MemorySettings.model_validate({"checkpointing": value})
    assert MemorySettings(checkpointing=0) == MemorySettings()
    assert MemorySettings.model_validate({"budget": "auto"}).budget is None


# --- commands --------------------------------------------------------------------------------


def configured(bench: Bench, *assignments: str) -> Config:
    options = [f"backbone.{name}={value}" for name, value in bench.backbone if value is not None]
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


def test_a_run_writes_down_the_number(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    budget = bench.need(1).card / GIB
    settled = choose_blocks(configured(bench, f"memory.budget={budget}"))
    assert settled.memory.checkpointing == 1
    assert "Checkpointing 1 of 5 blocks" in capsys.readouterr().err
    written = tomllib.loads(settled.toml())["memory"]
    assert MemorySettings(**written) == settled.memory
    assert choose_blocks(settled) is settled


def test_fit_shows_the_fewest_blocks_that_fit_a_card(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [MODE.model_copy(update={"checkpointing": count}) for count in ("none", "blocks")]
    monkeypatch.setattr("dpo_video.estimation.forecast.ladder", lambda references, loss: ends)
    config = configured(bench)
    memory = bench.need(3).card / SHARE / GIB
    card = find_tier("t4").model_copy(update={"memory_gib": memory})
    rows = predict(config, card=card).needs
    assert [need.mode.checkpointing for need in rows] == ["none", 3, "blocks"]


def test_a_device_that_does_not_say_needs_a_budget(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"no budget on the device cpu\. Set memory\.budget=GIB"):
        choose_blocks(configured(bench), device=torch.device("cpu"))
