"""No step stores a matrix of tokens by tokens: attention is scaled_dot_product_attention."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from small_cogvideox import OPTIONS as COGVIDEOX
from small_wan import OPTIONS as WAN
from small_wan import save_small_wan
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_video import registry
from dpo_video.estimation.tracing import empty_pairs
from dpo_video.loss.global_ import Global
from dpo_video.memory.modes import apply_memory_modes
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import Backbone
from dpo_video.training.lora import adapt
from dpo_video.training.step import Step
from dpo_video.types import Placement

# Sizes for which no number of tokens equals a number of channels.
SIZES: dict[str, dict[str, Any]] = {
    "animatediff": {"frames": 3, "height": 24, "width": 40},
    "cogvideox": {**COGVIDEOX, "height": 48, "width": 80},
    "wan": {**WAN, "height": 48, "width": 80, "text_length": 10},
}


class Kernels(TorchFunctionMode):
    """Records the sizes that attention matrices would have: batch times heads, queries, keys."""

    def __init__(self) -> None:
        super().__init__()
        self.avoided: Counter[tuple[int, int, int]] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            given = {**dict(zip(("query", "key"), args[:2], strict=False)), **(kwargs or {})}
            query, key = given["query"], given["key"]
            self.avoided[query[..., 0, 0].numel(), query.shape[-2], key.shape[-2]] += 1
        return func(*args, **(kwargs or {}))


class Made(TorchDispatchMode):
    """Records the shapes of all tensors made in the forward and backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, int, int]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.dim() > 2:
                self.shapes.add((each[..., 0, 0].numel(), each.shape[-2], each.shape[-1]))
        return result


@pytest.fixture(params=SIZES)
def policy(
    request: pytest.FixtureRequest, small_folder: Path, small_cogvideox: Path, tmp_path: Path
) -> tuple[Any, nn.Module]:
    name = request.param
    folder = {"animatediff": small_folder, "cogvideox": small_cogvideox}.get(name)
    made: Backbone = registry.load("backbone", name)(
        model=str(folder or save_small_wan(tmp_path)), **SIZES[name]
    )  # type: ignore[assignment]
    model = made.load(Placement())
    return model, adapt(model, TrainSettings(rank=2), seed=0)


def step_of(model: Any, policy: nn.Module) -> tuple[Kernels, Made]:
    step = Step(model=model, policy=policy, reference_model=Toggle().attach(policy), loss=Global())
    batch, noise, timestep = empty_pairs(model, model.prompt_shapes(), 1, torch.float32)
    with Kernels() as kernels, Made() as made:
        step(batch, noise, timestep)
    return kernels, made


def test_no_step_holds_a_matrix_of_tokens_by_tokens(policy: tuple[Any, nn.Module]) -> None:
    model, network = policy
    apply_memory_modes(network, MemorySettings())
    kernels, made = step_of(model, network)
    layers = [module for module in network.modules() if hasattr(module, "set_processor")]
    assert sum(kernels.avoided.values()) == 2 * len(layers) > 0  # reference and policy
    assert not kernels.avoided.keys() & made.shapes


def test_a_processor_that_stores_the_matrix_is_replaced(small_folder: Path) -> None:
    model = registry.load("backbone", "animatediff")(
        model=str(small_folder), **SIZES["animatediff"]
    ).load(Placement())  # type: ignore[attr-defined]
    network = adapt(model, TrainSettings(rank=2), seed=0)
    expected, _ = step_of(model, network)
    for module in network.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    kernels, made = step_of(model, network)
    assert not kernels.avoided and expected.avoided.keys() <= made.shapes
    apply_memory_modes(network, MemorySettings())
    kernels, made = step_of(model, network)
    assert kernels.avoided == expected.avoided and not kernels.avoided.keys() & made.shapes
