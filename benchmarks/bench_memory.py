"""Peak memory and throughput of a training step, by model, tier and memory mode.

    pytest benchmarks --benchmark-only -k "wan and l4"
    dpo-video bench memory --tier l4

Each test is one model on one tier's card in one mode: `preset`, which the tier's presets select, or
a mode of `dpo-video estimate` with the tier's rank and precision. `extra_info` holds the figures.

On a GPU the model has its full size and random weights, and the process is limited to the memory
of the tier's card less CUDA's own (`set_per_process_memory_fraction`); `extra_info` names the real
card and the share. On a CPU the peak is predicted at full size, and the time is that of a small
model of the same family in fp32, in the same mode.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NoReturn

import diffusers
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.support.rounds import MISSING
from benchmarks.support.small_models import SMALL
from benchmarks.support.steps import Steps, free_memory, on_meta, prepared, settle_peak
from benchmarks.support.tier_table import (
    BESIDES,
    BLOCKS,
    HOST,
    MEASURED,
    MODE,
    OPERATIONS,
    PREDICTED,
    PRESET,
    RANK,
    group_name,
)  # fmt: skip
from dpo_video.errors import UserError
from dpo_video.estimation.estimate import estimate_memory
from dpo_video.estimation.fewest_blocks import BUDGET_SHARE, fewest_blocks
from dpo_video.estimation.modes import MemoryMode, candidate_modes
from dpo_video.estimation.results import CONTEXT, GIB, MemoryEstimate
from dpo_video.estimation.tiers import find_tier, tiers
from dpo_video.estimation.tracing import TraceCache
from dpo_video.loss.global_ import Global
from dpo_video.memory.blocks import passes
from dpo_video.reference.copy import Copy
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.workflows.config import Config, resolve
from dpo_video.workflows.estimate import mode_of, phases_of, predict

MODELS = {
    "animatediff": ("animatediff", "sd1.5"),
    "cogvideox-2b": ("cogvideox", "cogvideox-2b"),
    "cogvideox-5b": ("cogvideox", "cogvideox-5b"),
    "wan-1.3b": ("wan", "wan2.1-t2v-1.3b"),
    "wan-14b": ("wan", "wan2.1-t2v-14b"),
}
REFERENCES = {"toggle": Toggle(), "copy": Copy()}
MODES = {
    mode.brief().replace(" ", "-"): mode
    for mode in [
        *candidate_modes(list(REFERENCES), Global()),
        MemoryMode(
            reference="toggle", checkpointing="blocks", backward="split", quantization="int8"
        ),
    ]
}
SECONDS = 20.0  # longest time that the rounds of a test may take on a GPU
CPU_SECONDS = 6.0  # the same on a CPU
TRACES: dict[str, TraceCache] = {}
FLOPS: dict[tuple[str, str, int], int] = {}

diffusers.utils.logging.set_verbosity_error()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    only = metafunc.config.getoption("--tier")
    metafunc.parametrize("model", MODELS)
    metafunc.parametrize("tier", [find_tier(only).name] if only else list(tiers()))
    metafunc.parametrize("mode", [PRESET, *MODES])


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A mode of a model on a tier's card, with its prediction at full size."""

    config: Config
    need: MemoryEstimate
    blocks: int
    """Blocks of the model that can be checkpointed."""
    besides: str
    """The largest of everything but the steps, for the presets."""


@cache
def configured(model: str, tier: str) -> Config:
    family, name = MODELS[model]
    choices = {"backbone": family, "loss": "global"}  # a loss that every backward pass takes
    return resolve(tier=tier, choices=choices, assignments=[f"backbone.model={name}"])


def traces_of(config: Config) -> TraceCache:
    """The traces of a configuration, which tiers of equal rank, precision and size share."""
    shaping = config.train.model_dump(include={"rank", "mixed_precision", "batch_size"})
    key = json.dumps([config.backbone.model_dump(mode="json"), shaping])
    return TRACES.setdefault(key, TraceCache())


@cache
def planned(model: str, tier: str, mode: str) -> Planned:
    config = configured(model, tier)
    traces = traces_of(config)
    if mode != PRESET:
        asked = MODES[mode]
        found = estimate_memory(
            config.backbone, {asked.reference: REFERENCES[asked.reference]}, config.loss,
            config.train, modes=[asked], traces=traces,
        )  # fmt: skip
        need, blocks = found.estimates[0], found.blocks
        return Planned(config=config, need=need, blocks=blocks, besides="")
    asked, memory = mode_of(config), find_tier(tier).memory_gib * GIB
    if config.memory.checkpointing == "auto":
        choice = fewest_blocks(
            config.backbone, config.reference, config.loss, config.train, asked,
            BUDGET_SHARE * memory, traces=traces,
        )  # fmt: skip
        asked = choice.estimate.mode
    host = {"text_encoder": config.memory.text_encoder}
    config = replace(config, memory=asked.memory.model_copy(update=host))
    found = predict(config, alone=True, traces=traces)
    phases = phases_of(config, found, traces)
    largest = max(phases, key=lambda phase: phase.total, default=None)
    besides = "" if largest is None else f"{largest.name} {largest.total / GIB:.1f}"
    return Planned(config=config, need=found.estimates[0], blocks=found.blocks, besides=besides)


def skip(group: str, mode: str, reason: str) -> NoReturn:
    """Skip a mode and list it with the reason in the results."""
    MISSING[f"memory/{group}"][mode] = reason
    pytest.skip(reason)


def small_steps(
    model: str, plan: Planned, folder: Path, device: torch.device, quick: bool
) -> Steps:
    """Steps of the small model of a family; as large a share of its blocks is checkpointed."""
    mode = plan.need.mode
    family = MODELS[model][0]
    small = SMALL[family](folder / f"{family}-{quick}", device, quick)
    if isinstance(mode.checkpointing, int):
        share = mode.checkpointing / plan.blocks
        count = max(1, round(share * len(passes(small.denoiser)[0])))
        mode = mode.model_copy(update={"checkpointing": count})
    settings = TrainSettings(
        rank=min(plan.config.train.rank, 16), batch_size=1, gradient_accumulation_steps=1
    )
    return prepared(small, settings, mode)


def full_steps(plan: Planned, device: torch.device) -> tuple[Steps, int]:
    """Steps of the model at full size, and the pairs of each."""
    train = plan.config.train
    # In the second batch of a step, the gradients of the first one exist.
    update = {"gradient_accumulation_steps": min(2, train.gradient_accumulation_steps)}
    settings = train.model_copy(update=update)
    model = on_meta(plan.config.backbone, settings, device)
    pairs = settings.gradient_accumulation_steps * settings.batch_size
    return prepared(model, settings, plan.need.mode), pairs


def limit_memory(tier: str, device: torch.device) -> float:
    """Limit this process to what the tier's card leaves to torch; the share of this card."""
    total = torch.cuda.get_device_properties(device).total_memory
    share = min(1.0, (find_tier(tier).memory_gib * GIB - CONTEXT) / total)
    torch.cuda.set_per_process_memory_fraction(share, device)
    return share


def test_memory(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, model: str, tier: str, mode: str,
    quick: bool, device: torch.device, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    group, card = group_name(model, tier), find_tier(tier)
    try:
        plan = planned(model, tier, mode)
    except UserError as error:  # no number of checkpointed blocks fits
        skip(group, mode, str(error))
    need, train = plan.need, plan.config.train
    figures: dict[str, float | str] = {
        MODE: need.mode.brief(), BLOCKS: plan.blocks, RANK: train.rank,
        "precision": train.mixed_precision,
        PREDICTED: need.total / GIB,
        "fits": "yes" if need.fits(card) else "no",
        HOST: need.host / GIB,
        OPERATIONS: need.flops / 1e12,
    }  # fmt: skip
    if mode == PRESET:
        figures[BESIDES] = plan.besides
    benchmark.group = group
    benchmark.extra_info.update(
        suite="memory", group=group, candidate=mode, baseline=None, figures=figures
    )
    rounds = 1 if quick else request.config.getoption("--rounds")
    try:
        if device.type == "cpu":
            on_cpu(benchmark, model, plan, tmp_path_factory.getbasetemp(), rounds, quick=quick)
        elif need.fits(card):
            on_gpu(benchmark, tier, plan, rounds, device)
        else:
            skip(group, mode, f"predicted not to fit: {need.total / GIB:.1f} GiB")
    except torch.OutOfMemoryError:
        skip(group, mode, f"out of the {card.memory_gib:g} GiB of {card.card}")
    except ImportError as error:
        skip(group, mode, f"{error.name} is not installed")
    finally:
        free_memory(device)


def on_cpu(
    benchmark: BenchmarkFixture, model: str, plan: Planned, folder: Path, rounds: int, *,
    quick: bool,
) -> None:  # fmt: skip
    """Time the small model of the family; the peak is the predicted one."""
    steps = small_steps(model, plan, folder, torch.device("cpu"), quick)
    key = (model, plan.need.mode.brief(), plan.config.train.rank)
    if key not in FLOPS:  # counting is a warm-up, too
        FLOPS[key] = steps.count().flops
    began = time.perf_counter()
    steps.optimize()
    rounds = max(1, min(rounds, int(CPU_SECONDS / (time.perf_counter() - began))))
    benchmark.pedantic(steps.optimize, rounds=rounds, iterations=1)
    about = benchmark.extra_info
    about.update(
        peak_gib=about["figures"][PREDICTED], peak_is="predicted", unit="small model's pair",
        throughput_of="a small model, fp32, CPU",
    )  # fmt: skip
    rate(benchmark, pairs=1, flops=FLOPS[key])


def on_gpu(
    benchmark: BenchmarkFixture, tier: str, plan: Planned, rounds: int, device: torch.device
) -> None:
    """Time the model at full size and read its peak, in the memory of the tier's card."""
    share = limit_memory(tier, device)
    steps, pairs = full_steps(plan, device)
    steps.optimize()
    settle_peak()
    began = time.perf_counter()
    steps.optimize()
    rounds = max(1, min(rounds, int(SECONDS / (time.perf_counter() - began))))
    benchmark.pedantic(steps.optimize, rounds=rounds, iterations=1)
    about = benchmark.extra_info
    about["figures"] |= {
        "peak of tensors, GiB (predicted)": plan.need.tensors / GIB,
        "peak of tensors, GiB (measured)": torch.cuda.max_memory_allocated() / GIB,
        MEASURED: torch.cuda.max_memory_reserved() / GIB,
    }
    about.update(
        peak_gib=about["figures"][MEASURED], peak_is="measured", unit="pair",
        throughput_of="the model at full size", card=torch.cuda.get_device_name(),
        memory_share=share,
    )  # fmt: skip
    rate(benchmark, pairs=pairs, flops=plan.need.flops)


def rate(benchmark: BenchmarkFixture, *, pairs: int, flops: int) -> None:
    """Add pairs and operations per second; `flops` is of a pair."""
    about = benchmark.extra_info
    about.update(work=pairs, flops=float(flops))
    if benchmark.stats is not None:  # None with --benchmark-disable
        about["pairs_per_second"] = pairs / benchmark.stats.stats.median
        tflops = about["pairs_per_second"] * flops / 1e12
        about["tflops_per_second"] = tflops
        small = "" if about["peak_is"] == "measured" else ", small model"
        about["figures"][f"TFLOP/s{small}"] = tflops
