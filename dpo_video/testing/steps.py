"""Contracts of what a run takes its steps with: timestep samplers, optimizers and schedules."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from dpo_video.extensions import Optimizer, Schedule, TimestepSampler
from dpo_video.registry.returned import tensor_fault
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import VideoModel
from dpo_video.support.tensor_tree import load_state, save_state
from dpo_video.testing.contracts import check_options
from dpo_video.testing.inputs import latent_noise
from dpo_video.testing.laws import contract, law, pure
from dpo_video.training.optimizer import learning_rate, make_optimizer

_DRAWS = 512


@contract
def check_timesteps(sampler: TimestepSampler, model: VideoModel) -> None:
    """Check that it draws timesteps of the family, by the generator alone.

    Args:
        sampler: The strategy.
        model: Any small model.
    """
    check_options(sampler)
    name = type(sampler).__name__

    def draw(n: int, seed: int) -> Tensor:
        return sampler(model, n, Generator().manual_seed(seed))

    with pure(name):
        one, again, other = draw(_DRAWS, 0), draw(_DRAWS, 0), draw(_DRAWS, 1)
        single = draw(1, 0)
    for value, n in ((one, _DRAWS), (single, 1)):
        fault = tensor_fault(value, (n,), device="cpu")
        law(not fault, f"{name} returns something that {fault}. Return `n` timesteps on the CPU.")
    law(torch.equal(one, again), f"{name} draws other timesteps from the same generator.")
    law(not torch.equal(one, other), f"{name} draws the same timesteps from every generator.")
    family = model.sample_timesteps(8 * _DRAWS, Generator().manual_seed(0))
    law(
        one.min() >= 0 and one.max() <= 1.01 * family.max(),
        f"{name} draws timesteps up to {one.max():g}; the family's are between 0 and about "
        f"{family.max():g}. Return them in the family's unit.",
    )
    law(
        not torch.equal(family, family.round()) or torch.equal(one, one.round()),
        f"{name} draws fractions, and the family's timesteps are whole numbers. Round them.",
    )
    clean, noise = latent_noise(model, 2), latent_noise(model, 2)
    noisy = model.add_noise(clean, noise, one[:2].to(model.device))
    law(noisy.isfinite().all(), f"{name} draws timesteps at which noisy latents are not finite.")


@contract
def check_optimizer(optimizer: Optimizer) -> None:
    """Check that it minimizes, follows the learning rate, and resumes to the bit."""
    check_options(optimizer)
    name, settings = type(optimizer).__name__, TrainSettings(learning_rate=0.05)
    for offload in ((), ("optimizer",)) if optimizer.offloads else ((),):
        memory = MemorySettings(offload=offload)

        def start(weights: list[Tensor], memory: MemorySettings = memory) -> _Problem:
            return _Problem(optimizer, weights, settings, memory)

        first = [torch.randn(3, 4, generator=Generator().manual_seed(n)) for n in (0, 1)]
        with pure(name):
            whole = start(first)
            errors = [whole.step() for _ in range(8)]
            parts = start(first)
            for _ in range(4):
                parts.step()
        law(
            all(error.isfinite() for error in errors) and errors[-1] < errors[0],
            f"{name} does not lower a quadratic function in 8 steps at a learning rate of 0.05.",
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            try:
                save_state(path, parts.optimizer.state_dict())
            except TypeError as error:
                raise AssertionError(
                    f"{name}'s state cannot be saved in a checkpoint ({error}). Keep tensors, "
                    "numbers, texts, and lists and dicts of them."
                ) from error
            resumed = start([weight.detach().clone() for weight in parts.weights])
            resumed.optimizer.load_state_dict(load_state(path))
        for _ in range(4):
            resumed.step()
        law(
            all(map(torch.equal, resumed.weights, whole.weights)),
            f"{name} takes other steps after a resume. Keep all that changes in its state_dict.",
        )
        before = [weight.detach().clone() for weight in whole.weights]
        for group in whole.optimizer.param_groups:
            group["lr"] = 0.0
        whole.step()
        law(
            all(map(torch.equal, before, whole.weights)),
            f"{name} changes weights at a learning rate of 0. Read it from the parameter group in "
            "every step: schedules set it there.",
        )


class _Problem:
    """The distance of weights from 1, to be minimized."""

    def __init__(
        self,
        optimizer: Optimizer,
        weights: list[Tensor],
        settings: TrainSettings,
        memory: MemorySettings,
    ) -> None:
        self.weights = [nn.Parameter(weight.clone()) for weight in weights]
        self.optimizer = make_optimizer(optimizer, self.weights, settings, memory)

    def step(self) -> Tensor:
        """Take a step; the distance before it."""
        self.optimizer.zero_grad()
        error = torch.stack([(weight - 1).square().mean() for weight in self.weights]).sum()
        error.backward()
        self.optimizer.step()
        return error.detach()


@contract
def check_schedule(schedule: Schedule) -> None:
    """Check that its factor is a function of the step and the settings, and above 0 somewhere."""
    check_options(schedule)
    name = type(schedule).__name__
    for settings in (
        TrainSettings(steps=20, warmup_steps=4, decay=0.5),
        TrainSettings(steps=8, warmup_steps=0),
        TrainSettings(steps=1),
    ):
        with pure(name):
            rates = [learning_rate(schedule, settings, step) for step in range(settings.steps)]
            again = [
                learning_rate(schedule, settings, s) for s in range(settings.steps - 1, -1, -1)
            ]
        law(
            rates == again[::-1],
            f"{name} depends on the calls before. Compute the factor from the step alone: a "
            "resumed run starts in the middle.",
        )
        law(max(rates) > 0, f"{name} is 0 at all of {settings.steps} steps.")
