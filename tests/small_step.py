"""One training step of a small model, shared by the tests of the memory modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Loss, Reference, VideoModel
from dpo_video.training.lora import adapt
from dpo_video.training.objective import PairFigures, figures, seen_by_losses
from dpo_video.training.step import Step
from dpo_video.types import PairBatch, PairErrors

MemoryMode = Literal["joint", "split", "linear"]

FIRST, SECOND = torch.ones(4), -torch.ones(4)
MIXED, EVEN = torch.tensor([1.0, 0, -1, -1]), torch.tensor([1.0, -1, 1, -1])
TIES = torch.zeros(4)
SHARE = 1 / 3


def a_batch(model: VideoModel, *preferences: Tensor) -> PairBatch:
    """Random pairs with half the picture as their region."""
    generator = torch.Generator().manual_seed(1)
    pairs, (_, frames, height, width) = len(preferences), model.latent_shape
    first, second = torch.randn(2, pairs, *model.latent_shape, generator=generator)
    region = torch.zeros(pairs, 1, frames, height, width)
    region[..., : width // 2] = 1
    return PairBatch(
        first=first,
        second=torch.where(region > 0, second, first),
        preference=torch.stack([labels[:frames] for labels in preferences]),
        region=region,
        strength=torch.full((pairs,), 0.8),
        context=model.encode_prompts(["a red square", "a blue circle moving"][:pairs]),
        keys=[str(pair) for pair in range(pairs)],
    )


class Bench:
    """A model with an adapter that has moved, and one draw for each of its pairs."""

    def __init__(self, model: VideoModel, reference: Reference | None = None) -> None:
        self.model = model
        self.policy = adapt(model, TrainSettings(rank=2, alpha=4), seed=0)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in self.policy.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.01 * torch.randn(parameter.shape, generator=generator)
        self.reference_model = (reference or Toggle()).attach(self.policy)
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]

    def draw(self, pairs: int) -> tuple[Tensor, Tensor]:
        """Noise and timestep."""
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(pairs, *self.model.latent_shape, generator=generator)
        return noise, self.model.sample_timesteps(pairs, generator)

    def step(
        self,
        mode: MemoryMode,
        batch: PairBatch,
        loss: Loss,
        *,
        backward: Callable[[Tensor], None] = Tensor.backward,
        weight: Tensor | None = None,
    ) -> PairFigures:
        run = Step(
            model=self.model,
            policy=self.policy,
            reference_model=self.reference_model if loss.needs_reference else None,
            loss=loss,
            mode=mode,
            backward=backward,
        )
        return run(batch, *self.draw(len(batch.first)), weight=weight, loss_scale=SHARE)

    def plain(self, batch: PairBatch, loss: Loss) -> PairFigures:
        """All graphs alive and one backward pass, by the textbook; one video a forward pass."""
        noise, timestep = self.draw(len(batch.first))

        def signed(network: nn.Module, video: Tensor) -> Tensor:
            rows = [slice(pair, pair + 1) for pair in range(len(video))]
            noisy = self.model.add_noise(video, noise, timestep)
            predictions = [
                self.model.predict(
                    network, noisy[row], timestep[row],
                    {name: value[row] for name, value in batch.context.items()},
                )
                for row in rows
            ]  # fmt: skip
            return torch.cat(predictions) - self.model.target(video, noise, timestep)

        with torch.no_grad(), self.reference_model.network() as network:
            reference = [signed(network, video) for video in (batch.first, batch.second)]
        if not loss.needs_reference:
            reference = [torch.zeros_like(error) for error in reference]
        policy = [signed(self.policy, video) for video in (batch.first, batch.second)]
        errors = PairErrors(
            policy_first=policy[0].square(),
            policy_second=policy[1].square(),
            reference_first=reference[0].square(),
            reference_second=reference[1].square(),
            policy_product=(policy[0] * policy[1]).detach(),
            preference=batch.preference,
            region=batch.region,
            strength=batch.strength,
            **seen_by_losses(self.model, timestep),
        )
        (SHARE * loss(errors).loss.mean()).backward()
        return figures(loss, errors)

    def gradient(self, mode: MemoryMode, batch: PairBatch, loss: Loss, **options: object) -> Tensor:
        self.policy.zero_grad()
        self.step(mode, batch, loss, **options)  # type: ignore[arg-type]
        return self.flat()

    def flat(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])


def apart(one: Tensor, other: Tensor) -> float:
    """Relative distance."""
    return float((one - other).norm() / one.norm())
