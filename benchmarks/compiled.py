"""Gain of memory.compile=on, and the steps until it pays: small models, eager and compiled.

    OMP_NUM_THREADS=1 python -m benchmarks.compiled            # or --model NAME, repeatable

A step is the forward and backward passes of one pair with the toggled reference. Eager and compiled
steps alternate, so that load on the machine affects both. The first compiled step builds the graphs
and compiles their kernels, in one process and from an empty cache; then once more from the filled
cache, as a resumed run does. Times are processor seconds, compilers included. Also printed: the
margin of a zero adapter, which must stay exactly 0, and the relative change of the gradient of a
nonzero adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.support.small_models import small_cogvideox, small_wan, tiny
from dpo_video.loss.global_ import Global
from dpo_video.memory.modes import apply_memory_modes
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import VideoModel
from dpo_video.training.lora import adapt
from dpo_video.training.step import Step
from dpo_video.types import PairBatch

RESULTS = Path(__file__).parent / "results" / "0.1.0" / "compiled.json"
STEPS = 12  # eager and compiled each
CPU = torch.device("cpu")
EAGER, COMPILED = MemorySettings(), MemorySettings(compile="on")


MODELS: dict[str, Callable[[Path, torch.device, bool], VideoModel]] = {
    "a small Wan": small_wan,
    "a small CogVideoX": small_cogvideox,
    "tiny, an AnimateDiff": tiny,
}


def used() -> float:
    """Processor seconds of this process and of the compilers that it started."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, whose))


def measured(name: str, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = MODELS[name](Path(folder) / "model", CPU, quick)
    policy = adapt(model, TrainSettings(rank=16), seed=0)
    step = Step(
        model=model, policy=policy, reference_model=Toggle().attach(policy), loss=Global(beta=100)
    )
    generator = torch.Generator().manual_seed(0)
    size, shapes = (1, *model.latent_shape), model.prompt_shapes()
    assert shapes is not None
    batch = PairBatch(
        first=torch.randn(size, generator=generator),
        second=torch.randn(size, generator=generator), preference=torch.ones(1, size[2]),
        region=torch.ones(1, 1, *size[2:]), strength=torch.ones(1), keys=["0"],
        context={n: torch.randn(1, *s, generator=generator) for n, s in shapes.items()},
    )  # fmt: skip
    noise, timestep = torch.randn(size, generator=generator), model.sample_timesteps(1, generator)

    def seconds(memory: MemorySettings) -> float:
        apply_memory_modes(policy, memory)
        policy.zero_grad()
        before = used()
        step(batch, noise, timestep)
        return used() - before

    def gradient(memory: MemorySettings) -> torch.Tensor:
        seconds(memory)
        found = [weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None]
        return torch.cat(found)

    seconds(EAGER)
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    cold = seconds(COMPILED)
    graphs = stats["unique_graphs"] - before
    margin = step(batch, noise, timestep).margin.item()
    rounds = [(seconds(EAGER), seconds(COMPILED)) for _ in range(1 if quick else STEPS)]
    plain, compiled = (median(times) for times in zip(*rounds, strict=True))
    ratios = sorted(each[1] / each[0] for each in rounds)
    ratio = median(ratios)
    for name, weight in policy.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(std=0.01, generator=generator)
    exact, found = gradient(EAGER), gradient(COMPILED)
    torch._dynamo.reset()
    warm = seconds(COMPILED)

    def pays(first: float) -> int | None:
        """Steps until a compiled run is ahead; None if it never is."""
        return round(1 + (first - plain) / (plain * (1 - ratio))) if ratio < 1 else None

    return {
        "eager": plain, "compiled": compiled, "ratio": ratio,
        "quartiles": quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
        "graphs": graphs, "first step": cold, "first step, cached": warm,
        "steps until it pays": pays(cold), "steps until it pays, cached": pays(warm),
        "margin before training": margin,
        "relative change of the gradient": float((exact - found).norm() / exact.norm()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, one round; writes nothing"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else {}
    for name in given.model or MODELS:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            torch._inductor.config.compile_threads = 1
            found[name] = measured(name, given.quick)
        print(name, *(f"  {what}: {value}" for what, value in found[name].items()), sep="\n")
        if not given.quick:
            machine = f"one core of a shared {platform.machine()} server, torch {torch.__version__}"
            RESULTS.write_text(json.dumps({"machine": machine, "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
