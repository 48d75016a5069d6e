"""A short training of `tiny`, compared step by step with the recorded one.

    OMP_NUM_THREADS=1 python -m benchmarks.trust.trajectory            # compare with the record
    OMP_NUM_THREADS=1 python -m benchmarks.trust.trajectory --spread   # effect of other kernels
    OMP_NUM_THREADS=1 python -m benchmarks.trust.trajectory --cost     # cost of determinism
    OMP_NUM_THREADS=1 python -m benchmarks.trust.trajectory --write    # replace the record

It detects small changes of a constant, of a random draw or of an order, which no other test does. A
change that alters the numbers on purpose replaces the record, and its commit gives the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator

from dpo_video.strategies import VideoModel
from dpo_video.support.report import StepReport
from dpo_video.training.run import train
from dpo_video.workflows.build import obtain_pairs
from dpo_video.workflows.config import resolve
from dpo_video.workflows.session import load_model, pick_device

RECORD = Path(__file__).parent / "trajectory.json"
STEPS = 3
RECIPES: Mapping[str, Sequence[str]] = {
    "local, region": ("build.count=1", "pairs.num_inference_steps=2", "loss.sft_weight=10"),
    "jitter, sdpo": ("build.count=2", "pairs.chosen=clip"),
}
FIGURES = ("loss", "margin", "chosen_change", "rejected_change", "grad_norm")
TOLERANCE = 2e-3
"""Relative. Other kernels (`--spread`: two threads, and those of torch, oneDNN and MKL for older
processors) change no figure by more than 2.6e-4, and a constant that is off by 1% changes some by
1e-2 or more: the tolerance is seven times the former and a fifth of the latter. The learning rate
is ten times the usual one, so that the change in three steps is large compared with rounding; at
3e-4 other kernels changed the figures by 1.3e-3."""
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "one thread": {},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "torch's kernels without AVX": {"ATEN_CPU_CAPABILITY": "default"},
    "torch's kernels for AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "oneDNN for SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "oneDNN for AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL for SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "MKL, any processor": {"MKL_CBWR": "COMPATIBLE"},
    "all three, oldest": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
    },
}

Trajectory = list[dict[str, float]]


def run(
    recipe: str,
    *,
    steps: int = STEPS,
    options: Sequence[str] = (),
    change: Callable[[VideoModel], None] = lambda model: None,
) -> list[StepReport]:
    """Train a recipe for a few steps of one pair.

    Args:
        recipe: A key of `RECIPES`: pairs and loss.
        steps: Number of steps.
        options: Further options, as for `--set`.
        change: Applied to the model before training.
    """
    pairs, loss = recipe.split(", ")
    config = resolve(
        choices={"pairs": pairs, "loss": loss, "backbone": "tiny"},
        metrics=("frame_difference",),
        assignments=(
            "run.device=cpu",
            "build.previews=false",
            f"train.steps={steps}",
            "train.gradient_accumulation_steps=1",
            "train.rank=4",
            "train.learning_rate=3e-3",
            "train.warmup_steps=1",
            "train.validation_videos=0",
            "train.report_to=none",
            *RECIPES[recipe],
            *options,
        ),
    )
    model = load_model(config, pick_device("cpu"))
    change(model)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        store = obtain_pairs(config, model, out)
        accelerator = Accelerator(cpu=True)
        events = train(
            model, store, config.loss, config.reference, config.train, seed=0, out=out / "run",
            accelerator=accelerator,
        )  # fmt: skip
        return [progress.report for progress in events]


def figures(reports: Sequence[StepReport]) -> Trajectory:
    return [{name: getattr(report, name) for name in FIGURES} for report in reports]


def recorded(recipe: str) -> Trajectory:
    trajectory: Trajectory = json.loads(RECORD.read_text(encoding="utf-8"))[recipe]
    return trajectory


def deviation(found: Trajectory, expected: Trajectory) -> float:
    """The largest difference between two trajectories, relative to the expected value.

    Changes of error and margins are small differences of errors: their differences are relative to
    the largest of them in the step. Where all of them are 0, they must be 0.
    """
    largest = 0.0
    for ours, theirs in zip(found, expected, strict=False):
        changes = max(abs(theirs[name]) for name in ("margin", "chosen_change", "rejected_change"))
        for name in FIGURES:
            scale = abs(theirs[name]) if name in ("loss", "grad_norm") else changes
            error = abs(ours[name] - theirs[name])
            largest = max(largest, error / scale if scale else float("inf") if error else 0.0)
    return largest


def _spread() -> None:
    """Train in every setting and print the deviations from the record."""
    for name, environment in SETTINGS.items():
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.trust.trajectory", "--json"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        deviations = [f"{deviation(found[recipe], recorded(recipe)):.1e}" for recipe in RECIPES]
        print(f"{name:30} {'  '.join(deviations)}", flush=True)


def _cost(rounds: int) -> None:
    """Alternate trainings with and without determinism, and print their processor times."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for deterministic, times in seconds.items():
            began = time.process_time()
            run(
                "jitter, sdpo", steps=6, options=[f"run.deterministic={str(deterministic).lower()}"]
            )
            times.append(time.process_time() - began)
    before, after = (statistics.median(times) for times in seconds.values())
    ratios = [on / off for off, on in zip(*seconds.values(), strict=True)]
    print(f"default {before:.2f} s, deterministic {after:.2f} s; ratios {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the record")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--spread", action="store_true", help="deviations with other kernels")
    parser.add_argument("--cost", action="store_true", help="cost of determinism")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of --cost")
    given = parser.parse_args()
    if given.spread:
        return _spread()
    if given.cost:
        return _cost(given.rounds)
    found = {recipe: figures(run(recipe)) for recipe in RECIPES}
    if given.json:
        return print(json.dumps(found))
    if given.write:
        RECORD.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    deviations = {recipe: deviation(found[recipe], recorded(recipe)) for recipe in RECIPES}
    for recipe, size in deviations.items():
        print(f"{recipe}: deviation {size:.1e}, allowed {TOLERANCE:.0e}")
    sys.exit(any(size > TOLERANCE for size in deviations.values()))


if __name__ == "__main__":
    main()
