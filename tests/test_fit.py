"""Predictions against what real tensors take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CPU, SHAPE

from dpo_video import registry
from dpo_video.backbone.animatediff import AnimateDiff
from dpo_video.models import known_models
from dpo_video.pretrained import outlined


@pytest.fixture(scope="module")
def backbone(small_folder: Path) -> AnimateDiff:
    return AnimateDiff(
        model=str(small_folder), frames=SHAPE.frames, height=SHAPE.height, width=SHAPE.width
    )


def test_an_outline_is_the_model_without_its_weights(backbone: AnimateDiff) -> None:
    loaded = backbone.load(CPU, torch.float16)
    with outlined():
        outline = backbone.load(CPU, torch.float16)
    described = {name: (p.shape, p.dtype) for name, p in loaded.denoiser.state_dict().items()}
    assert described == {
        name: (p.shape, p.dtype) for name, p in outline.denoiser.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in outline.denoiser.parameters())
    assert not any(parameter.requires_grad for parameter in outline.denoiser.parameters())
    assert outline.latent_shape == loaded.latent_shape
    prompt = loaded.encode_prompts(["a red square"])
    assert outline.prompt_shapes() == {name: value.shape[1:] for name, value in prompt.items()}


@pytest.mark.parametrize("model", [m for m in known_models() if m.backbone in ("wan", "cogvideox")])
def test_a_known_model_is_outlined_offline_by_its_name(model: object) -> None:
    chosen = registry.load("backbone", model.backbone)(model=model.name)  # type: ignore[attr-defined]
    with outlined():
        outline = chosen.load(CPU, torch.bfloat16)  # type: ignore[attr-defined]
        assert outline.prompt_shapes()["prompt_embeds"][1] == 4096
    parameters = sum(parameter.numel() for parameter in outline.denoiser.parameters())
    assert parameters == model.parameters  # type: ignore[attr-defined]
    assert outline.lora_targets()
