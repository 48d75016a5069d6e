"""Validation videos: of the pairs' prompts, or of a list with its seeds and negative prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_animatediff import load_small
from small_training import SETTINGS, make_store
from torch import Tensor

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.loss.region import Region
from dpo_video.reference.toggle import Toggle
from dpo_video.training.run import train
from dpo_video.types import Prompt

LIST = [Prompt(text="a red square", seed=5), Prompt(text="a dog", negative_prompt="blur")]


@pytest.mark.parametrize("prompts", [[], LIST, [*LIST, Prompt(text="one too many")]])
def test_videos_are_of_the_first_prompts_of_a_list_with_their_seeds(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[Prompt]
) -> None:
    model = load_small(small_folder)
    store = make_store(tmp_path / "pairs", model, 2)
    drawn: list[tuple[Tensor, Tensor, str | None]] = []
    sample = AnimateDiffModel.sample

    def recorded(self: AnimateDiffModel, context: Any, noise: Tensor, **options: Any) -> Tensor:
        drawn.append((context["prompt_embeds"], noise, options.get("negative_prompt")))
        return sample(self, context, noise, num_inference_steps=1, **options)

    monkeypatch.setattr(AnimateDiffModel, "sample", recorded)
    texts = [prompt.text for prompt in prompts[:2]] or [record.prompt for record in store.records]
    expected = [model.encode_prompts([text])["prompt_embeds"] for text in texts]
    settings = SETTINGS.model_copy(update={"steps": 1, "validation_videos": 2})
    list(
        train(
            model, store, Region(), Toggle(), settings, seed=0, out=tmp_path / "run",
            accelerator=Accelerator(cpu=True), validation_prompts=prompts,
        )
    )  # fmt: skip
    assert len(list((tmp_path / "run/samples/step_000001").iterdir())) == len(drawn) == 2
    for (context, noise, negative), embedded, seed, away in zip(
        drawn, expected, (5, 1) if prompts else (0, 1), (None, "blur" if prompts else None),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(context, embedded)
        assert torch.equal(noise, initial_noise(model, [seed])) and negative == away
