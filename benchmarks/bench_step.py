"""Optimizer steps of one pair in every memory mode, published implementations, and a lower bound.

Our steps run the training loop itself, with everything around the model: reading the pair, drawing
noise, the loss, clipping, AdamW, the report and the log. The baseline is the time that the
operations of a step (reference and policy on both videos) would take at the rate of a large matrix
product, measured in the same round. `networks alone` makes the same passes on prepared tensors.
`cached` is timed after its predictions are cached.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.practice import frozen_copy, research_script, step, video_dpo
from benchmarks.support.rounds import Measure
from benchmarks.support.small_models import small_wan, tiny
from dpo_video import registry
from dpo_video.data.store import Manifest, PairStore
from dpo_video.memory.peak import Peak, peak_bytes
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import Loss, Reference, VideoModel
from dpo_video.training.lora import adapt
from dpo_video.training.objective import noised
from dpo_video.training.run import train
from dpo_video.types import Pair, PairBatch

PAIRS = 4
SETTINGS = TrainSettings(
    steps=10**6,
    batch_size=1,
    gradient_accumulation_steps=1,
    rank=16,
    alpha=16,
    learning_rate=1e-5,
    save_steps=10**6,
    validation_videos=0,
    report_to="none",
)
# In the proportion of the published recipes: rank 64 for Wan2.1-1.3B's 1536 channels.
RANKS = {"tiny": 16, "a small Wan": 16}
FLOOR = "operations at the matmul rate"
ALONE = "networks alone: toggle, joint"
MODES = {
    f"{reference}, {backward}": (reference, MemorySettings(backward=backward, checkpointing=again))
    for reference, backward, again in (
        ("toggle", "joint", "none"),
        ("copy", "joint", "none"),
        ("cached", "joint", "none"),
        ("toggle", "split", "none"),
        ("toggle", "linear", "none"),
        ("cached", "linear", "none"),
    )
} | {"toggle, joint, blocks checkpointed": ("toggle", MemorySettings(checkpointing="blocks"))}
SCRIPT, VIDEO_DPO = "diffusers' research script", "Video-DPO, standard mode"
"""See practice.py."""


@dataclass(frozen=True)
class StepInputs:
    """Prepared inputs of a step."""

    batch: PairBatch
    noise: Tensor
    timestep: Tensor


MODELS = {"tiny": tiny, "a small Wan": small_wan}


@cache
def folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="dpo-video-bench-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def load(name: str, device: torch.device, quick: bool) -> VideoModel:
    return MODELS[name](folder() / "wan", device, quick)


def pairs(name: str, model: VideoModel) -> PairStore:
    """Random latents; the time of a step does not depend on them."""
    manifest = Manifest(
        recipe={}, identity=model.identity, latent_shape=model.latent_shape, fps=model.shape.fps
    )
    store = PairStore.create(folder() / f"pairs of {name}", manifest)
    generator = torch.Generator().manual_seed(0)
    shapes = model.prompt_shapes()
    assert shapes is not None
    for index in range(len(store), PAIRS):
        first, second = torch.randn(2, *model.latent_shape, generator=generator)
        pair = Pair(
            first=first, second=second, preference=torch.ones(model.latent_shape[1]),
            region=torch.ones(1, *model.latent_shape[1:]), prompt=str(index), source="random",
        )  # fmt: skip
        store.append(
            pair,
            {key: torch.randn(1, *shape, generator=generator) for key, shape in shapes.items()},
        )
    return store


def step_inputs(name: str, model: VideoModel) -> StepInputs:
    generator = torch.Generator().manual_seed(0)
    return StepInputs(
        pairs(name, model).batch([0]).to(model.device),
        torch.randn(1, *model.latent_shape, generator=generator).to(model.device),
        model.sample_timesteps(1, generator).to(model.device),
    )


def settings(name: str) -> TrainSettings:
    return SETTINGS.model_copy(update={"rank": RANKS[name], "alpha": RANKS[name]})


def strategy(kind: str, name: str) -> Any:
    return registry.load(kind, name)()


def ours(name: str, mode: str, device: torch.device, quick: bool) -> Callable[[], object]:
    reference, memory = MODES[mode]
    model = load(name, device, quick)
    source: Reference = strategy("reference", reference)
    if reference == "cached":
        source = source.model_copy(update={"draws": 1})
    loss: Loss = strategy("loss", "global")
    steps = train(
        model, pairs(name, model), loss, source, settings(name), seed=0,
        out=folder() / "runs" / name / mode, accelerator=Accelerator(cpu=device.type == "cpu"),
        memory=memory,
    )  # fmt: skip
    return lambda: next(steps)


def theirs(name: str, which: str, device: torch.device, quick: bool) -> Callable[[], object]:
    model = load(name, device, quick)
    inputs = step_inputs(name, model)
    policy = adapt(model, settings(name), 0)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-5)
    if which == SCRIPT:
        passes = research_script(model, policy)
    else:
        passes = video_dpo(model, policy, frozen_copy(policy))
    run_step = step(passes, policy, optimizer)
    return lambda: run_step(inputs.batch, inputs.noise, inputs.timestep)


def networks_alone(name: str, device: torch.device, quick: bool) -> Callable[[], object]:
    """The passes of a step without a loss: a lower bound for any step with these passes."""
    model = load(name, device, quick)
    inputs = step_inputs(name, model)
    policy = adapt(model, settings(name), 0)
    noisy = noised(model, inputs.batch, inputs.noise, inputs.timestep)
    arguments = noisy.noisy, noisy.timestep, noisy.context
    gradient = torch.ones_like(noisy.target)
    toggle: Reference = strategy("reference", "toggle")
    reference_model = toggle.attach(policy)

    def call() -> None:
        with torch.no_grad(), reference_model.network() as reference:
            model.predict(reference, *arguments)
        model.predict(policy, *arguments).backward(gradient)
        policy.zero_grad()

    return call


@cache
def candidate_of(name: str, which: str, device: torch.device, quick: bool) -> Callable[[], object]:
    if which == ALONE:
        return networks_alone(name, device, quick)
    if which in (SCRIPT, VIDEO_DPO):
        return theirs(name, which, device, quick)
    return ours(name, which, device, quick)


@cache
def counted(name: str, which: str, device: torch.device, quick: bool) -> Peak:
    """Operations of a step and the peak of its tensors in bytes."""
    call = candidate_of(name, which, device, quick)
    call()  # the first call creates AdamW's state and the cached predictions
    return peak_bytes(lambda: (call(), None)[1], networks=[])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.candidates(FLOOR, ALONE, *MODES, SCRIPT, VIDEO_DPO)
def test_step(
    measure: Measure, candidate: str, model: str, quick: bool, device: torch.device
) -> None:
    call: Callable[[], object]
    if candidate == FLOOR:
        size = 64 if quick else 1536
        matrix = torch.randn(size, size, device=device)
        call = lambda: matrix @ matrix  # noqa: E731
        flops: float = counted(model, ALONE, device, quick).flops
        work, figures = 2 * size**3 / flops, {}
    else:
        call = candidate_of(model, candidate, device, quick)
        counts = counted(model, candidate, device, quick)
        flops, work, figures = counts.flops, 1, {"peak of tensors, MiB": counts.total / 2**20}
    measure(
        f"a training step of one pair, {model}", call, unit="pair", work=work, baseline=FLOOR,
        flops=flops, figures=figures,
    )  # fmt: skip
