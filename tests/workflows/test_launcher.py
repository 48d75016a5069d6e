"""What a launcher requests is done by the package's own options, or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dpo_video.errors import UserError
from dpo_video.workflows.config import Config, resolve
from dpo_video.workflows.session import as_launched


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
