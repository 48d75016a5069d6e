"""Bytes and operations equal counts made by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dpo_video.memory.cuda_autocast import cuda_autocast
from dpo_video.memory.peak import BLOCK, Peak, on_host, peak_bytes
from dpo_video.support.memoryless import Memoryless

ROWS, WIDTH = 64, 32
ACTIVATION = 4 * ROWS * WIDTH
WEIGHT = 4 * WIDTH * WIDTH


def chain(layers: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)])


def test_activations_of_a_chain_with_and_without_backward() -> None:
    network, inputs = chain(5), torch.zeros(ROWS, WIDTH)

    def evaluate() -> None:
        with torch.no_grad():
            network(inputs)

    bare = peak_bytes(evaluate, networks=[network])
    assert bare.weights == 5 * WEIGHT
    assert bare.activations == 3 * ACTIVATION  # the input, and a layer's input and output
    kept = peak_bytes(lambda: network(inputs).backward(inputs), networks=[network])
    # The peak is in the backward pass of the last layer but one: inputs of the four layers up to
    # it, the output, two gradients of activations and two of weights.
    assert kept.activations == (4 + 1 + 2) * ACTIVATION + 2 * WEIGHT
    assert bare.flops == 5 * 2 * ROWS * WIDTH * WIDTH
    assert kept.flops == (3 * 5 - 1) * 2 * ROWS * WIDTH * WIDTH  # the inputs need no gradient


def test_views_and_freed_tensors_do_not_count() -> None:
    def views() -> None:
        whole = torch.zeros(ROWS, WIDTH)
        for _ in range(3):
            whole.view(-1)[1:].unsqueeze(0)

    def one_after_another() -> None:
        for _ in range(3):
            torch.zeros(ROWS, WIDTH)

    assert peak_bytes(views).total == peak_bytes(one_after_another).total == ACTIVATION
    assert peak_bytes(lambda: torch.zeros(1)).total == BLOCK


def test_gradients_and_optimizer_state_count_separately() -> None:
    network, inputs = chain(2), torch.zeros(ROWS, WIDTH)
    optimizer = torch.optim.AdamW(network.parameters())
    before = [parameter.clone() for parameter in network.parameters()]

    def accumulate() -> None:
        for _ in range(2):
            network(inputs).sum().backward()

    peak = peak_bytes(lambda: None, networks=[network], optimizer=optimizer)
    state = 2 * (2 * WEIGHT + BLOCK)  # two momenta and a step count per weight
    assert peak == Peak(weights=2 * WEIGHT, gradients=0, optimizer=state, activations=0, flops=0)
    for parameter, value in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, value) and parameter.grad is None
    peak = peak_bytes(accumulate, networks=[network], optimizer=optimizer)
    assert (peak.weights, peak.gradients, peak.optimizer) == (2 * WEIGHT, 2 * WEIGHT, state)
    assert peak.total == peak.activations + 4 * WEIGHT + state


def test_host_memory_counts_separately() -> None:
    def run() -> None:
        here = torch.zeros(ROWS, WIDTH)
        with on_host():
            there = torch.empty_like(here)
        there.copy_(here)
        del here
        torch.zeros(ROWS, WIDTH)

    peak = peak_bytes(run)
    assert (peak.total, peak.host) == (ACTIVATION, ACTIVATION)


def test_a_trace_lists_the_tensors_alive_at_the_peak() -> None:
    network, inputs = chain(2), torch.zeros(ROWS, WIDTH)

    def run() -> None:
        torch.zeros(1)  # freed before the peak
        network(inputs).sum().backward()

    peak = peak_bytes(run, networks=[network], trace=True)
    assert sum(holder.bytes for holder in peak.holders) == peak.total
    assert {holder.kind for holder in peak.holders} == {"weights", "activations"}
    assert peak.holders[0].bytes == max(holder.bytes for holder in peak.holders)
    assert all("torch" not in holder.lines for holder in peak.holders)
    assert any("test_peak.py" in holder.lines for holder in peak.holders)
    assert "MiB" in str(peak.holders[0])


class Mixed(nn.Module):
    """A convolution, a norm and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = F.silu(self.norm(self.conv(pixels))).flatten(2).transpose(1, 2).contiguous()
        heads = tokens.unflatten(2, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads)


def measured(size: int) -> Peak:
    network, pixels = Mixed(), torch.ones(2, 8, size, size)
    optimizer = torch.optim.AdamW(network.parameters())
    return peak_bytes(
        lambda: network(pixels).sum().backward(), networks=[network], optimizer=optimizer
    )


def test_tensors_without_memory_count_as_real_ones() -> None:
    real = measured(8)
    for mode in (FakeTensorMode(), Memoryless()):
        with mode:
            assert measured(8) == real


def test_attention_stores_no_matrix() -> None:
    with Memoryless():
        small, large = measured(16), measured(32)
    assert large.activations == pytest.approx(4 * small.activations, rel=0.02)
    tokens = 16 * 16
    convolved, attended = 2 * 2 * tokens * 8 * 8 * 9, 2 * 2 * 2 * tokens * tokens * 8
    # Backward: the convolution's weight gradient only; five products of attention for two forward.
    assert small.flops == 2 * convolved + 3.5 * attended


def test_a_norm_runs_in_fp32_as_on_a_gpu() -> None:
    norm, inputs = nn.GroupNorm(2, 8), torch.zeros(2, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(inputs.bfloat16()).dtype == torch.bfloat16
    with cuda_autocast(torch.bfloat16):
        assert norm(inputs.bfloat16()).dtype == torch.float32
        assert nn.Linear(4, 4)(inputs).dtype == torch.bfloat16
    norm.bfloat16()
    assert norm(inputs.bfloat16()).dtype == torch.bfloat16


def test_recomputation_keeps_the_dtype() -> None:
    network, inputs = (
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)),
        torch.ones(2, 4),
    )
    network.requires_grad_(False)
    inputs.requires_grad_()
    with cuda_autocast(torch.bfloat16):  # a recomputed tensor of another dtype is an error
        output = checkpoint(network.forward, inputs, use_reentrant=False)
        torch.autograd.backward(output.sum())
    assert inputs.grad is not None
