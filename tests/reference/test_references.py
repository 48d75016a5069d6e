from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import load_small
from torch import Tensor, nn

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.loss.global_ import Global
from dpo_video.reference.copy import Copy
from dpo_video.reference.ema import EMA
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Reference
from dpo_video.training.lora import adapt
from dpo_video.training.objective import pair_errors
from dpo_video.types import PairBatch, PairErrors


def a_batch(model: AnimateDiffModel, pairs: int = 2) -> PairBatch:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, pairs, *model.latent_shape, generator=generator)
    frames = model.latent_shape[1]
    return PairBatch(
        first=first,
        second=second,
        preference=torch.ones(pairs, frames),
        region=torch.ones(pairs, 1, *model.latent_shape[1:]),
        strength=torch.full((pairs,), 0.75),
        context=model.encode_prompts(["a red square"] * pairs),
        keys=["0", "1"],
    )


def step(folder: Path, reference: Reference, *, trained: bool) -> tuple[PairErrors, list[Tensor]]:
    """Errors and adapter gradients of one step, with an adapter that has or has not moved."""
    model = load_small(folder)
    policy = adapt(model, TrainSettings(rank=2, alpha=4), seed=0)
    if trained:
        generator = torch.Generator().manual_seed(2)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    reference_model = reference.attach(policy)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, *model.latent_shape, generator=generator)
    timestep = model.sample_timesteps(2, generator)
    errors = pair_errors(model, policy, reference_model, a_batch(model), noise, timestep)
    Global()(errors).loss.sum().backward()
    return errors, [p.grad for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("reference", [Copy(), Toggle(), EMA()])
def test_an_adapter_that_has_not_moved_gives_exactly_ln_2(
    small_folder: Path, reference: Reference
) -> None:
    errors, gradients = step(small_folder, reference, trained=False)
    output = Global()(errors)
    assert (output.margin == 0).all()
    assert output.loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert any((gradient != 0).any() for gradient in gradients)


@pytest.mark.parametrize("autocast", [False, True])
def test_ema_predicts_what_the_averaged_adapter_does(
    small_model: AnimateDiffModel, autocast: bool
) -> None:
    policy = adapt(small_model, TrainSettings(rank=2, alpha=4), seed=0)
    batch, weights = a_batch(small_model), [p for p in policy.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(3)
    timestep = small_model.sample_timesteps(2, generator)

    def predicted(network: nn.Module) -> Tensor:
        return small_model.predict(network, batch.first, timestep, batch.context)

    def mixed() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    reference = EMA(decay=0.75).attach(policy)
    average = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for _ in range(2):
            for weight in weights:
                weight.data = weight + 0.1 * torch.randn(weight.shape, generator=generator)
            reference.after_step()
            average = [0.75 * old + 0.25 * new for old, new in zip(average, weights, strict=True)]
            with mixed():  # which caches casts of the weights
                own = predicted(policy)
                with reference.network() as network:
                    found = predicted(network)
                assert torch.equal(predicted(policy), own)
        for weight, value in zip(weights, average, strict=True):
            weight.data = value
        with mixed():
            expected = predicted(policy)
    tolerance = 1e-2 if autocast else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(found, own, rtol=tolerance, atol=tolerance)
    policy.unload()


def test_toggle_equals_copy(small_folder: Path) -> None:
    copied, copied_gradients = step(small_folder, Copy(), trained=True)
    toggled, toggled_gradients = step(small_folder, Toggle(), trained=True)
    for name, value in vars(copied).items():
        if value is not None:  # `between`, which groups have
            assert torch.equal(value, getattr(toggled, name)), name
    assert (copied.policy_first != copied.reference_first).any()
    for one, other in zip(copied_gradients, toggled_gradients, strict=True):
        assert torch.equal(one, other)


def test_both_videos_get_the_same_noise_and_timestep(small_model: AnimateDiffModel) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(nn.Module):
        def forward(
            self, noisy: Tensor, timestep: Tensor, *_: object, **__: object
        ) -> tuple[Tensor]:
            seen.append((noisy, timestep))
            return (noisy,)

    policy = adapt(small_model, TrainSettings(rank=2), seed=0)
    batch = a_batch(small_model)
    noise = torch.randn(2, *small_model.latent_shape)
    timestep = torch.tensor([100.0, 900.0])
    pair_errors(small_model, Spy(), Toggle().attach(policy), batch, noise, timestep)
    noisy, timesteps = seen[0]
    assert timesteps.tolist() == [100, 900, 100, 900]
    alpha = small_model.scheduler.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1, 1)
    for half, clean in zip(noisy.chunk(2), (batch.first, batch.second), strict=True):
        recovered = (half - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        torch.testing.assert_close(recovered, noise, rtol=1e-4, atol=1e-5)


def test_the_adapter_is_on_again_after_the_reference_even_if_it_fails(
    small_model: AnimateDiffModel,
) -> None:
    policy = adapt(small_model, TrainSettings(rank=2), seed=0)
    reference_model = Toggle().attach(policy)
    with pytest.raises(RuntimeError), reference_model.network():
        assert policy.get_model_status().enabled is False
        raise RuntimeError
    assert policy.get_model_status().enabled is True


def test_only_the_motion_modules_attention_trains(small_model: AnimateDiffModel) -> None:
    policy = adapt(small_model, TrainSettings(rank=2), seed=0)
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trainable
    assert all("motion_modules" in name and ".lora_" in name for name in trainable)
    projections = {name.split(".lora_")[0].rsplit("attn", 1)[1] for name in trainable}
    assert projections == {f"{i}.{p}" for i in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")}
