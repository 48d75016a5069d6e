"""Several processes train what one trains, and share the frozen weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as some
from small_animatediff import load_small
from small_training import SETTINGS, make_store

from benchmarks.trust.processes import hashes, small_model
from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.errors import TrainingError, UserError
from dpo_video.loss.global_ import Global
from dpo_video.memory.packed_weights import frozen_weights, pack_frozen_weights
from dpo_video.memory.sharding import Shard
from dpo_video.reference.cached import Cached
from dpo_video.settings import MemorySettings
from dpo_video.training.run import train
from dpo_video.workflows.config import Config, resolve
from dpo_video.workflows.session import as_launched


def test_two_processes_that_share_the_weights_train_what_one_trains(tmp_path: Path) -> None:
    ways = ["one process", "two that share the frozen weights"]
    assert len(set(hashes(tmp_path, small_model(tmp_path / "small"), ways).values())) == 1


@given(count=some.integers(1, 5), size=some.integers(0, 40))
def test_the_parts_of_a_tensor_are_alike_and_make_it_whole(count: int, size: int) -> None:
    tensor = torch.arange(size, dtype=torch.int16).view(torch.float16)
    parts = [Shard(rank=rank, count=count).take(tensor) for rank in range(count)]
    assert len({len(part) for part in parts}) == 1
    together = torch.cat(parts)
    assert torch.equal(together[: tensor.nbytes], tensor.view(torch.uint8))
    assert len(together) < tensor.nbytes + count  # padding, and nothing twice


def test_a_process_stores_its_part_alone(small_model: AnimateDiffModel) -> None:
    device = torch.device("cpu")
    pack_frozen_weights(small_model.denoiser, device, "int8", shard=Shard(rank=1, count=4))
    stored = sum(
        part.nbytes for each in frozen_weights(small_model.denoiser) for part in each.parts
    )
    whole = sum(
        shape.numel() * dtype.itemsize
        for each in frozen_weights(small_model.denoiser)
        for shape, dtype in each.unsharded
    )
    assert whole / 4 <= stored < 0.3 * whole


def launched(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, *more: str) -> Config:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return as_launched(resolve(choices={"pairs": "somewhere/"}, assignments=more))


def test_fsdp_becomes_memory_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    asks = {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "8"}
    config = launched(asks, monkeypatch)
    assert config.memory.shard == config.tables["memory"]["shard"] == 8
    assert "ACCELERATE_USE_FSDP" not in os.environ  # or Accelerate would do it as well
    assert (
        launched({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "1"}, monkeypatch).memory.shard == 1
    )
    among = launched(
        {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "8"}, monkeypatch, "memory.shard=2"
    )
    assert among.memory.shard == 2


OPTIMIZER = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("zero", "shard", "offload"),
    [
        ({"stage": 1}, 1, ()),
        ({"stage": 2, **OPTIMIZER}, 1, ("optimizer",)),
        ({"stage": 3, "offload_param": {"device": "none"}}, 4, ()),
        (
            {"stage": 3, "offload_param": {"device": "nvme"}, **OPTIMIZER},
            4,
            ("blocks", "optimizer"),
        ),
    ],
)
def test_deepspeed_settings_become_memory_modes(
    zero: dict[str, Any],
    shard: int,
    offload: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": zero, "train_batch_size": "auto"}))
    plain = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "4"}
    by_name = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero["stage"]),
        **{
            f"ACCELERATE_DEEPSPEED_{part.upper()}_DEVICE": zero[part]["device"]
            for part in zero.keys() - {"stage"}
        },
    }
    for asks in ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}, by_name):
        config = launched({**plain, **asks}, monkeypatch)
        assert (config.memory.shard, config.memory.offload) == (shard, offload)
        assert config.tables["memory"]["offload"] == list(offload)
        assert not any("DEEPSPEED" in name for name in os.environ)


def test_fsdp_offload_becomes_memory_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    asks = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true", "WORLD_SIZE": "2"}
    assert launched(asks, monkeypatch).memory.offload == ("blocks",)


@pytest.mark.parametrize(
    ("environment", "more", "said"),
    [
        (
            {"WORLD_SIZE": "4"},
            "memory.shard=3",
            "does not divide this run's number of proc",
        ),
        ({}, "memory.shard=2", "start that many processes"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere"},
            "train.steps=1",
            "'nowhere' cannot be read",
        ),
    ],
)
def test_an_impossible_launch_is_an_error(
    environment: dict[str, str], more: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=said):
        launched(environment, monkeypatch, more)


def test_pairs_are_built_before_the_weights_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="Build them first"):
        as_launched(resolve(choices={"pairs": "jitter"}, assignments=["memory.shard=2"]))


def test_a_cache_is_not_filled_by_processes_that_share_the_weights(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "pairs", small_model)
    steps = train(
        load_small(small_folder), store, Global(), Cached(), SETTINGS,
        seed=0, out=tmp_path / "run", accelerator=Accelerator(cpu=True),
        memory=MemorySettings(shard=2),
    )  # fmt: skip
    with pytest.raises(TrainingError, match="Train with --reference toggle"):
        next(steps)
