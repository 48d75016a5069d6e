"""Packed weights: offloaded ones keep their bits, quantized ones come close."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import CPU
from small_animatediff import load_small
from small_wan import load_small_wan, save_small_wan
from test_blocks import EXACT, Network, apart
from torch import nn

from dpo_video.errors import TrainingError, UserError
from dpo_video.memory.blocks import checkpoint_blocks
from dpo_video.memory.packed_weights import (
    Base,
    PackedWeight,
    check_base,
    frozen_weights,
    pack_frozen_weights,
)
from dpo_video.reference.copy import Copy
from dpo_video.reference.toggle import Toggle
from dpo_video.support.memoryless import Memoryless

NO_BNB = "bitsandbytes is not installed: pip install 'dpo-video[nf4]'"
needs_bnb = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason=NO_BNB)
BASES = ["native", "int8", pytest.param("nf4", marks=needs_bnb)]


@pytest.fixture(params=["unet", "transformer"])
def network(request: pytest.FixtureRequest, small_folder: Path, tmp_path: Path) -> Network:
    """With 2D convolutions, or without convolutions."""
    if request.param == "unet":
        return Network(load_small(small_folder))
    return Network(load_small_wan(save_small_wan(tmp_path)))


def test_offloaded_weights_keep_gradients(network: Network) -> None:
    plain, before = network.gradient(), network.peak().weights
    count = pack_frozen_weights(network.policy, CPU, "native", on_host=True)
    assert count == len(list(frozen_weights(network.policy)))
    assert apart(plain, network.gradient()) < EXACT
    assert network.peak().weights < before
    checkpoint_blocks(network.policy)
    assert apart(plain, network.gradient()) < EXACT


def test_quantized_weights_are_close_and_smaller(network: Network) -> None:
    plain = network.gradient()
    pack_frozen_weights(network.policy, CPU, "int8")
    whole = sum(8 * each.shape.numel() for each in frozen_weights(network.policy))
    packed = sum(part.nbytes for each in frozen_weights(network.policy) for part in each.parts)
    assert packed < 0.3 * whole  # an eighth, plus scales; rows are short
    gradient = network.gradient()
    assert 0 < apart(plain, gradient) < 0.05
    checkpoint_blocks(network.policy)
    assert apart(gradient, network.gradient()) < EXACT


@pytest.mark.parametrize("reference", [Toggle(), Copy()], ids=repr)
def test_the_reference_is_packed_too(small_folder: Path, reference: Toggle | Copy) -> None:
    network = Network(load_small(small_folder))
    for name, parameter in network.policy.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    pack_frozen_weights(network.policy, CPU, "int8")
    given = (network.noisy, network.timestep, network.context)
    with torch.no_grad(), reference.attach(network.policy).network() as frozen:
        expected = network.model.predict(frozen, *given)
    assert torch.equal(expected, network.model.predict(network.policy, *given))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [(8, 32), (4, 6, 3, 3)])
def test_unpacking_is_exact_up_to_quantization(base: Base, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = PackedWeight.pack(weight, base, CPU, on_host=False).unpack()
    assert whole.shape == weight.shape and whole.dtype == weight.dtype
    # Half a step, of a row's largest value; nf4's widest step is 0.3.
    error = (whole - weight).abs()
    most = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1))
    bound = {
        "native": torch.zeros(()), "int8": most / 127 / 2, "nf4": weight.abs().max() * 0.16,
    }  # fmt: skip
    assert (error <= bound[base] * (1 + 1e-5)).all()
    zero = PackedWeight.pack(torch.zeros(shape), base, CPU, on_host=False).unpack()
    assert not zero.any()


@needs_bnb
def test_the_size_of_nf4_is_known_without_bitsandbytes() -> None:
    sizes = []
    for mode in (Memoryless(), torch.device("cpu")):
        with mode:
            packed = PackedWeight.pack(torch.empty(10, 33), "nf4", CPU, on_host=False)
            sizes.append([part.nbytes for part in packed.parts])
            assert packed.unpack().shape == (10, 33)
    assert sizes[0] == sizes[1]


def test_missing_blocks_and_packages_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(TrainingError, match=r"A Linear has no blocks.*memory\.quantization=native"):
        pack_frozen_weights(nn.Linear(4, 4), CPU, "int8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes.*memory\.quantization=int8"):
        check_base("nf4")
