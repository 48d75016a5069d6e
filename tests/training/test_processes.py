"""Several processes train what one trains, with replicated and with sharded weights."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import signal
import time
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_animatediff import load_small
from small_processes import in_processes, processes
from small_training import SETTINGS, adapter_hash, make_store, run
from small_wan import load_small_wan, save_small_wan
from torch import nn

from dpo_video.data.store import PairStore
from dpo_video.loss.global_ import Global
from dpo_video.memory.fsdp import shard_frozen_weights, sharded_bytes
from dpo_video.reference.cached import Cached
from dpo_video.reference.copy import Copy
from dpo_video.reference.ema import EMA
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import MemorySettings
from dpo_video.strategies import Reference
from dpo_video.support.report import StepEvent
from dpo_video.training.listeners import Listener
from dpo_video.training.run import train
from dpo_video.training.run_dir import latest_checkpoint, resumable

WAYS: Mapping[str, tuple[Mapping[str, Any], Reference]] = {
    "replicated": ({}, Toggle()),
    "joint": ({"shard": 2}, Toggle()),
    "split": (
        {"shard": 2, "backward": "split", "checkpointing": "blocks", "forward_chunks": 2},
        Cached(noise_draws=1),
    ),
    "linear": (
        {
            "shard": 2, "backward": "linear", "checkpointing": 1,
            "offload": "blocks,optimizer,checkpoints",
        },
        Copy(),
    ),
}  # fmt: skip


class KillsItself(Listener):
    """Ends the second process without notice once the first one has saved."""

    def on_checkpoint(self, folder: Path) -> None:
        if not self.run.is_main:
            while not resumable(self.run.out):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


def train_way(
    way: str, folder: Path, out: Path, processes: int, *, network: str = "wan", **options: Any
) -> None:
    """Train on two pairs a step, over so many processes."""
    memory, reference = WAYS[way]
    if processes == 1 or "shard" in options:
        memory = {**memory, "shard": options.pop("shard", 1)}
    load = {"wan": load_small_wan, "animatediff": load_small}[network]
    settings = SETTINGS.model_copy(
        update={
            "steps": options.pop("steps", 2), "gradient_accumulation_steps": 2 // processes,
            "validation_videos": int(network == "animatediff"),
        }
    )  # fmt: skip
    events = train(
        load(folder / network), PairStore(folder / f"{network}-pairs"), Global(), reference,
        settings, seed=0, out=out, accelerator=Accelerator(cpu=True),
        memory=MemorySettings.model_validate(memory), **options,
    )  # fmt: skip
    list(events)


def train_in_two(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="FSDP2")
    for way in WAYS:
        train_way(way, folder, folder / f"two-{way}", 2)
    train_way("split", folder, folder / "one-split", 2, shard=1)
    train_way("joint", folder, folder / "two-unet", 2, network="animatediff")
    count_bytes(folder)
    train_way("joint", folder, folder / "killed", 2, steps=4, listeners=[KillsItself()])


def count_bytes(folder: Path) -> None:
    """Write the bytes of the tensors alive in a wide network's pass, and those predicted."""
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=2048, num_layers=3, rope_max_seq_len=8,
    )  # fmt: skip
    network.requires_grad_(False)
    policy = get_peft_model(network, LoraConfig(r=1, target_modules=["ffn.net.2"]))
    predicted, before = sharded_bytes(policy, 2), alive()
    shard_frozen_weights([policy], 2, torch.device("cpu"))
    found = [alive()]

    def look(*_: object) -> None:
        found.append(alive())

    for block in network.blocks:
        block.ffn.register_forward_hook(look)
        block.ffn.register_full_backward_hook(look)
    inputs = torch.zeros(1, 4, 1, 2, 2), torch.ones(1), torch.zeros(1, 2, 8)
    policy(*inputs, return_dict=False)[0].sum().backward()
    rest = before - predicted.whole
    figures = {
        "parts": [predicted.parts, found[0] - rest],
        "gathered": [predicted.gathered, max(found) - found[0]],
    }
    (folder / "bytes.json").write_text(json.dumps(figures))


def alive() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def resume_in_two(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    train_way("joint", folder, out, 2, steps=4, resume=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_folder: Path) -> Path:
    """Runs of two processes in every way, and one of which the second process was killed."""
    found = tmp_path_factory.mktemp("processes")
    (found / "animatediff").symlink_to(small_folder)
    save_small_wan(found / "wan")
    make_store(found / "animatediff-pairs", load_small(small_folder))
    make_store(found / "wan-pairs", load_small_wan(found / "wan"))
    codes = in_processes(2, train_in_two, found)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, -signal.SIGKILL)  # it has lost the other one
    return found


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_the_adapter_of_one(way: str, folder: Path) -> None:
    if way != "split":  # it sums the gradients of four videos, in another order than two processes
        train_way(way, folder, folder / f"one-{way}", 1)
    one, two = (folder / f"{name}-{way}" for name in ("one", "two"))
    assert adapter_hash(two) == adapter_hash(one)
    configurations = [latest_checkpoint(run) / "adapter/adapter_config.json" for run in (one, two)]
    assert configurations[0].read_text() == configurations[1].read_text()


def test_sharded_weights_take_the_bytes_that_are_predicted(folder: Path) -> None:
    for predicted, found in json.loads((folder / "bytes.json").read_text()).values():
        assert found == pytest.approx(predicted, rel=0.05)


def test_a_unet_is_trained_up_to_rounding(folder: Path) -> None:
    train_way("joint", folder, folder / "one-unet", 1, network="animatediff")
    one, two = (
        load_file(latest_checkpoint(folder / f"{name}-unet") / "adapter/adapter_model.safetensors")
        for name in ("one", "two")
    )
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sharded_run_resumes_on_any_number_of_processes(processes: int, folder: Path) -> None:
    train_way("joint", folder, folder / "whole", 1, steps=4)
    resumed = folder / f"resumed-{processes}"
    shutil.copytree(folder / "killed", resumed)
    if processes == 1:
        train_way("joint", folder, resumed, 1, steps=4, resume=True)
    else:
        assert in_processes(2, resume_in_two, folder, resumed) == [0, 0]
    assert adapter_hash(resumed) == adapter_hash(folder / "whole")


class Tells(Listener):
    """Sends the number of every step that is done."""

    def __init__(self, steps: Connection) -> None:
        self.steps = steps

    def on_step_end(self, event: StepEvent) -> None:
        self.steps.send(event.report.step)


FOLLOWING = EMA(decay=0.5)
"""A reference with a state of its own, which a checkpoint must hold."""


def train_and_tell(folder: Path, out: Path, steps: Connection) -> None:
    torch.set_num_threads(1)
    store = PairStore(folder / "animatediff-pairs")
    run(folder / "animatediff", store, out, reference=FOLLOWING, listeners=[Tells(steps)])


def test_kill_9_at_any_step_then_resume_gives_the_same_bytes(folder: Path) -> None:
    heard, steps = multiprocessing.Pipe(duplex=False)
    # Random, but not by the clock: which step is hit varies with the machine, the law does not.
    process = processes().Process(target=train_and_tell, args=(folder, folder / "cut", steps))
    process.start()
    steps.close()
    while heard.recv() < 3:
        pass
    process.kill()
    process.join()
    heard.close()
    assert process.exitcode == -signal.SIGKILL
    assert latest_checkpoint(folder / "cut").is_dir()
    store = PairStore(folder / "animatediff-pairs")
    run(folder / "animatediff", store, folder / "cut", reference=FOLLOWING, resume=True)
    run(folder / "animatediff", store, folder / "uncut", reference=FOLLOWING)
    assert adapter_hash(folder / "uncut") == adapter_hash(folder / "cut")
