"""What waiting threads cost a training step on a busy CPU.

    python -m benchmarks.threads                # two threads, beside one busy process
    python -m benchmarks.threads --busy 0       # on a machine that runs nothing else

Between two parallel operations, OpenMP's threads wait. By default they spin for a while, which
takes the time of other processes, and of their own leader where there are fewer free cores than
threads. Each setting has a process of its own, since OpenMP reads it when torch is imported; these
take steps of one pair of `tiny` in turns. Reported: wall-clock and processor seconds of a step,
each relative to the default in the same round. Written to threads.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parent / "results" / "0.1.0"
DEFAULT = "as OpenMP does (spin)"
SETTINGS = {
    DEFAULT: {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def serve(threads: int) -> None:
    """Take a step for every line of the input, and print its wall-clock and processor seconds."""
    import torch

    from benchmarks.support.steps import prepared
    from dpo_video.backbone.tiny import Tiny
    from dpo_video.estimation.modes import MemoryMode
    from dpo_video.settings import TrainSettings
    from dpo_video.types import Placement

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    settings = TrainSettings(rank=16, batch_size=1, gradient_accumulation_steps=1)
    mode = MemoryMode(reference="toggle", checkpointing="none", backward="joint")
    steps = prepared(Tiny().load(Placement()), settings, mode)
    steps.optimize()
    print("ready", flush=True)
    for _ in sys.stdin:
        began, used = time.perf_counter(), time.process_time()
        steps.optimize()
        print(time.perf_counter() - began, time.process_time() - used, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", type=int, default=1, help="processes that compute beside it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of threads.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.threads)
        return
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "benchmarks.threads", "--serve", "--threads"]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    with ExitStack() as stack:
        children = {}
        for name, variables in SETTINGS.items():
            child = subprocess.Popen(
                [*command, str(given.threads)], env=clean | variables, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            stack.callback(child.kill)
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            children[name] = child
        for _ in range(given.busy):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(busy.kill)
        for _ in range(given.rounds):
            for name, child in children.items():
                assert child.stdin is not None and child.stdout is not None
                child.stdin.write("step\n")
                child.stdin.flush()
                wall, used = map(float, child.stdout.readline().split())
                found[name].append((wall, used))
    load, cores = os.getloadavg()[0], os.cpu_count()
    result = {
        "machine": f"{cores} cores, {platform.machine()}", "threads": given.threads,
        "busy": given.busy, "load": round(load, 1), "rounds": given.rounds,
        "settings": {name: row(rounds, found[DEFAULT]) for name, rounds in found.items()},
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "threads.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def row(rounds: list[tuple[float, float]], spin: list[tuple[float, float]]) -> dict[str, float]:
    """Median seconds of a step, and medians of the ratios within a round."""
    names = ("wall", "processor")
    seconds = {
        f"{name}_seconds": median(each[i] for each in rounds) for i, name in enumerate(names)
    }
    ratios = {
        f"relative_{name}": median(a[i] / b[i] for a, b in zip(rounds, spin, strict=True))
        for i, name in enumerate(names)
    }
    return {name: round(value, 4) for name, value in {**seconds, **ratios}.items()}


if __name__ == "__main__":
    main()
