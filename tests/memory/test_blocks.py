"""Checkpointing, chunks and offloaded inputs keep gradients and lower the peak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_animatediff import load_small
from small_cogvideox import load_small_cogvideox, save_small_cogvideox
from small_wan import load_small_wan, save_small_wan
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from dpo_video.diffusion.experts import Experts
from dpo_video.errors import TrainingError
from dpo_video.memory.blocks import (
    blocks,
    checkpoint_blocks,
    from_outside_in,
    passes,
    run_in_chunks,
)
from dpo_video.memory.hooks import is_wrapped
from dpo_video.memory.peak import Peak, peak_bytes
from dpo_video.settings import TrainSettings
from dpo_video.training.lora import adapt

EXACT = 1e-12  # in fp64


class Network:
    """A policy in fp64 with a nonzero adapter, one input, and a gradient of its output."""

    def __init__(self, model: Any) -> None:
        model.dtype, self.model = torch.float64, model
        self.policy = adapt(model, TrainSettings(rank=2, alpha=4), seed=0).double()
        generator = torch.Generator().manual_seed(2)
        for name, parameter in self.policy.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.01 * torch.randn(parameter.shape, generator=generator).double()
        self.noisy, self.pull = torch.randn(2, 1, *model.latent_shape, generator=generator).double()
        self.timestep = model.sample_timesteps(1, generator)
        self.context = model.encode_prompts(["a red square"])
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]

    def gradient(self) -> Tensor:
        self.policy.zero_grad()
        output = self.model.predict(self.policy, self.noisy, self.timestep, self.context)
        (output * self.pull).sum().backward()
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])

    def peak(self) -> Peak:
        return peak_bytes(lambda: bool(self.gradient().any()), networks=[self.policy])


@pytest.fixture
def unet(small_folder: Path) -> Network:
    return Network(load_small(small_folder))


@pytest.fixture(scope="module")
def small_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def transformer(small_wan: Path) -> Network:
    return Network(load_small_wan(small_wan))


@pytest.fixture
def joint_transformer(tmp_path: Path) -> Network:
    """CogVideoX: text and video in one sequence."""
    return Network(load_small_cogvideox(save_small_cogvideox(tmp_path, num_layers=3)))


@pytest.fixture(params=["unet", "transformer"])
def network(request: pytest.FixtureRequest) -> Network:
    found: Network = request.getfixturevalue(request.param)
    return found


def apart(one: Tensor, other: Tensor) -> float:
    """Relative distance."""
    return float((one - other).norm() / one.norm())


# --- chunks ----------------------------------------------------------------------------------


def test_chunks_keep_gradients_and_lower_the_peak(network: Network) -> None:
    plain, held = network.gradient(), network.peak().activations
    assert run_in_chunks(network.policy, 3) > 0
    assert apart(plain, network.gradient()) < EXACT
    assert network.peak().activations < held
    checkpoint_blocks(network.policy)
    assert apart(plain, network.gradient()) < EXACT
    run_in_chunks(network.policy, 1)
    checkpoint_blocks(network.policy, 0)
    assert torch.equal(plain, network.gradient())


def test_checkpointing_equals_torchs_wrapper_and_keeps_names(network: Network) -> None:
    names = [name for name, _ in network.policy.named_parameters()]
    chosen = set(blocks(network.policy))
    checkpoint_blocks(network.policy)
    ours, peak = network.gradient(), network.peak()
    assert [name for name, _ in network.policy.named_parameters()] == names
    checkpoint_blocks(network.policy, 0)
    apply_activation_checkpointing(network.policy, check_fn=chosen.__contains__)
    assert torch.equal(network.gradient(), ours)
    assert network.peak().total == peak.total
    # Once torch's wrapper keeps names, it can replace ours.
    assert any(
        "_checkpoint_wrapped_module" in name for name, _ in network.policy.named_parameters()
    )


def test_a_network_without_feed_forward_layers_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"A Linear has no feed-forward.*\.forward_chunks=1"):
        run_in_chunks(nn.Linear(4, 4), 2)


# --- checkpoints -----------------------------------------------------------------------------


def test_more_checkpointed_blocks_hold_fewer_activations(unet: Network) -> None:
    peaks = []
    for count in (0, 6, None):
        assert checkpoint_blocks(unet.policy, count) == {0: 0, 6: 6, None: 18}[count]
        peaks.append(unet.peak().activations)
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3


@pytest.mark.parametrize("family", ["unet", "transformer", "joint_transformer"])
@pytest.mark.parametrize("count", [1, 2])
def test_checkpointing_some_blocks_changes_no_bit(
    request: pytest.FixtureRequest, family: str, count: int
) -> None:
    network: Network = request.getfixturevalue(family)
    plain = network.gradient()
    assert checkpoint_blocks(network.policy, count) == count
    assert torch.equal(plain, network.gradient())


def test_the_count_holds_for_each_of_two_experts(small_wan: Path) -> None:
    one, other = load_small_wan(small_wan).denoiser, load_small_wan(small_wan).denoiser
    experts = Experts(one, other, boundary=500, park=False)
    assert [len(together) for together in passes(experts)] == [2, 2]
    assert checkpoint_blocks(experts, 1) == 2
    assert all(
        len([b for b in blocks(each) if is_wrapped(b, "checkpoint")]) == 1 for each in (one, other)
    )


def test_blocks_are_chosen_from_both_ends() -> None:
    assert from_outside_in([0, 1, 2, 3, 4]) == [0, 4, 1, 3, 2]
    assert from_outside_in([0, 1, 2, 3]) == [0, 3, 1, 2]


def test_block_inputs_are_offloaded_to_the_host(network: Network) -> None:
    plain = network.gradient()
    checkpoint_blocks(network.policy)
    here = network.peak()
    checkpoint_blocks(network.policy, inputs_on_host=True)
    there = network.peak()
    assert torch.equal(plain, network.gradient())
    assert here.host == 0 < there.host
    few = len(list(blocks(network.policy))) < 3  # one of two inputs is in use at any time
    assert there.activations < here.activations or few
