from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.diffusion.sampling import Schedule, denoise, first_step, frame_by_frame


@pytest.mark.parametrize(
    ("strength", "steps", "first"),
    [(1.0, 50, 0), (0.75, 50, 12), (0.95, 50, 2), (0.15, 20, 17), (0.001, 50, 49), (0.5, 1, 0)],
)
def test_strength_times_steps_are_run(strength: float, steps: int, first: int) -> None:
    assert first_step(strength, steps) == first


class Prompted(nn.Module):
    """Predicts a constant: the first number of the encoded prompt."""

    def forward(
        self, noisy: Tensor, timestep: Tensor, text: Tensor, **options: Any
    ) -> tuple[Tensor]:
        per_video = text.view(len(noisy), -1)[:, 0]
        return (per_video.view(-1, 1, 1, 1, 1).expand_as(noisy),)


@pytest.mark.parametrize("scales", [[0.0, 0.0], [1.0, 1.0], [3.0, -1.0]])
def test_guidance_extrapolates_from_the_empty_prompt_at_each_step(
    small_model: AnimateDiffModel, scales: list[float]
) -> None:
    context = {"prompt_embeds": torch.full((1, 3, 16), 5.0)}
    empty = {"prompt_embeds": torch.full((1, 3, 16), 2.0)}
    schedule = Schedule(
        timesteps=torch.tensor([900.0, 100.0]),
        next_timesteps=torch.tensor([100.0, 0.0]),
        step=lambda prediction, index, latents: latents + prediction,
    )
    noise = torch.zeros(1, *small_model.latent_shape)
    options: dict[str, Any] = {"empty": empty, "guidance_scale": scales}
    drawn = denoise(small_model, Prompted(), schedule, context, noise, **options)
    expected = sum(2.0 + scale * (5.0 - 2.0) for scale in scales)
    torch.testing.assert_close(drawn, torch.full_like(drawn, expected))
    unguided = denoise(
        small_model, Prompted(), schedule, context, noise, empty=None, guidance_scale=scales
    )
    assert (unguided == 10).all()
    late = denoise(small_model, Prompted(), schedule, context, noise, first=1, **options)
    torch.testing.assert_close(late, torch.full_like(late, 2.0 + scales[1] * 3.0))


@pytest.mark.parametrize("size", [1, 2])
def test_frame_by_frame_keeps_the_order_of_frames(size: int) -> None:
    noise, clean = torch.randn(2, 3, 2, 4, 5, 5)  # two videos of four frames
    region = torch.rand(3, 1, 4, 5, 5)
    context = {"prompt_embeds": torch.arange(3.0).view(3, 1, 1)}
    count = 4 // size

    def sample(
        context: dict[str, Tensor], noise: Tensor, *, clean: Tensor, region: Tensor, mark: int
    ) -> Tensor:
        assert noise.shape == clean.shape == (3 * count, 2, size, 5, 5) and mark == 7
        assert region.shape == (3 * count, 1, size, 5, 5)
        assert context["prompt_embeds"].flatten().tolist() == sorted([0.0, 1.0, 2.0] * count)
        return noise + 10 * clean + 100 * region

    drawn = frame_by_frame(sample, context, noise, clean=clean, region=region, size=size, mark=7)
    torch.testing.assert_close(drawn, noise + 10 * clean + 100 * region)
