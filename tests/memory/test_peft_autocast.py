"""Without peft's casts, less is saved for the backward pass and every bit stays."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import load_small
from peft import LoraConfig, PeftModel, get_peft_model
from small_wan import load_small_wan, save_small_wan
from torch import Tensor, nn

from dpo_video.memory.peft_autocast import skip_adapter_input_cast
from dpo_video.strategies import VideoModel

KINDS = ["animatediff", "wan"]


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def folders(small_folder: Path, wan_folder: Path) -> dict[str, Path]:
    return {"animatediff": small_folder, "wan": wan_folder}


def adapted(kind: str, folder: Path, *, uncast: bool) -> tuple[VideoModel, PeftModel]:
    """A model and a policy with a nonzero adapter in fp32."""
    model: VideoModel = load_small(folder) if kind == "animatediff" else load_small_wan(folder)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=model.lora_targets(), init_lora_weights=False
    )
    policy = get_peft_model(model.denoiser, config)
    assert isinstance(policy, PeftModel)
    if uncast:
        skip_adapter_input_cast(policy)
    return model, policy


def step(model: VideoModel, policy: PeftModel) -> tuple[Tensor, list[Tensor], int]:
    """Predictions, gradients, and the bytes kept for the backward pass."""
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, *model.latent_shape, generator=generator)
    timestep = model.sample_timesteps(2, generator)
    context = model.encode_prompts(["a red square", "a blue disc"])
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model.predict(policy, noisy, timestep, context)
        loss = predicted.float().square().mean()
        held = sum(kept.values())
    loss.backward()
    return predicted, [p.grad for p in policy.parameters() if p.grad is not None], held


# torch warns of a bf16 input with an fp32 weight on a CPU.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_keep_their_bits_and_less_is_saved(kind: str, folders: dict[str, Path]) -> None:
    plain, uncast = (step(*adapted(kind, folders[kind], uncast=uncast)) for uncast in (False, True))
    assert torch.equal(plain[0], uncast[0])
    assert len(plain[1]) == len(uncast[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain[1], uncast[1], strict=True))
    assert uncast[2] < plain[2]


def test_without_autocast_an_fp32_adapter_takes_half_precision() -> None:
    # As in sampling: frozen weights in half precision, and no autocast.
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).bfloat16()
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    policy = get_peft_model(layers, config)
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    x = torch.randn(4, 6).bfloat16()
    plain = policy(x)
    skip_adapter_input_cast(policy)
    assert torch.equal(policy(x), plain)
    assert torch.equal(copy.deepcopy(policy)(x), plain)
