"""Everything that needs a GPU, in one command: `make gpu`.

    python -m benchmarks.gpu                     # on a GPU; about 8 minutes on an H100
    python -m benchmarks.gpu --part memory       # one part (repeatable)
    python -m benchmarks.gpu --rehearse          # every part on a CPU, with small models

Parts: `tests` (tests/gpu), `demo` (train and evaluate `tiny` by the command line; compare with the
CPU's result), `memory` (measured against predicted peaks and the time of a step, for AnimateDiff
and Wan2.1-1.3B at full size with random weights), `tiers` (bench_memory.py for the presets of this
card), `compile` (time of compiled steps), `metrics` (time of the metrics). Each runs in its own
process with a time limit, and its result is written as soon as it exists, so that a failure loses
nothing else. Results: gpu.json, with the card's name, and bench/CARD/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.support.results import SuiteResult, write_result

RESULTS = Path(__file__).parent / "results" / "0.1.0"
REPOSITORY = Path(__file__).parents[1]
# The parts whose times are reported come first, one at a time; the others run together.
ALONE = ("memory wan-1.3b", "memory animatediff", "tiers", "metrics", "compile wan-1.3b",
         "compile animatediff")  # fmt: skip
TOGETHER = ("tests", "demo")
LIMITS = {"tests": 240, "demo": 240, "memory animatediff": 120, "memory wan-1.3b": 180,
          "tiers": 120,
          "metrics": 60, "compile wan-1.3b": 100, "compile animatediff": 150}  # fmt: skip
"""Seconds."""


def part_tests(out: Path, rehearse: bool) -> dict[str, Any]:
    """The tests of tests/gpu."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if rehearse:
        environment["DPO_VIDEO_TEST_DEVICE"] = "cpu"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-v", "-p", "no:cacheprovider",
               "-W", "default", "--durations", "5"]  # fmt: skip
    if not rehearse:
        command += ["--numprocesses", "6"]
    log = out / "tests.log"
    with log.open("w") as lines:  # as they come: a part that is stopped leaves what it has
        subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=lines,
                       stderr=subprocess.STDOUT, check=False)  # fmt: skip
    found = log.read_text().strip().splitlines()
    failed = [line for line in found if line.startswith(("FAILED", "ERROR"))]
    return {"summary": found[-1] if found else "", "failed": failed}


def part_demo(out: Path, rehearse: bool, save: Callable[[Any], None]) -> dict[str, Any]:
    """`make demo` on the GPU, in each precision; headline and seconds."""
    found: dict[str, Any] = {}
    for precision in ("no",) if rehearse else ("fp16", "bf16", "no"):
        run = out / f"demo-{precision}"
        count, steps, prompts = ("3", "2", "2") if rehearse else ("24", "40", "12")
        began = time.perf_counter()
        device = ["--device", "cpu" if rehearse else "cuda"]
        command(
            "train", "--pairs", "local", "--loss", "region", "--out", str(run), "--count", count,
            "--steps", steps, "--set", "train.batch_size=3", *device,
            "--set", "train.gradient_accumulation_steps=1", "--set", "train.learning_rate=3e-4",
            "--set", f"train.save_steps={steps}", "--set", "loss.sft_weight=1000",
            "--set", f"train.mixed_precision={precision}",
        )  # fmt: skip
        trained = time.perf_counter()
        command("evaluate", str(run), "--num-prompts", prompts, *device)
        evaluated = time.perf_counter()
        report = json.loads((run / "evaluation" / "evaluation.json").read_text())
        found[precision] = {
            "train_seconds": trained - began,
            "evaluate_seconds": evaluated - trained,
            "metrics": summary(report),
        }
        save(found)
    return found


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Means and relative change of every metric, with its interval."""
    keep = ("base_mean", "tuned_mean", "relative", "relative_low", "relative_high")
    return {row["name"]: {key: row["difference"][key] for key in keep if key in row["difference"]}
            for row in report["metrics"]}  # fmt: skip


def command(*arguments: str) -> None:
    """Run dpo-video; raise with the end of its output if it fails."""
    done = subprocess.run([sys.executable, "-m", "dpo_video", *arguments], text=True,
                          capture_output=True, check=False, cwd=REPOSITORY)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"dpo-video {arguments[0]}: {done.stdout[-1500:]}{done.stderr[-1500:]}")


def part_memory(case: str, rehearse: bool, save: Callable[[Any], None]) -> dict[str, Any]:
    """Predicted and measured peaks of every mode of memory.json that the card holds."""
    import torch

    from benchmarks import memory
    from benchmarks.support import steps
    from dpo_video.backbone.tiny import Tiny
    from dpo_video.estimation.results import GIB, MemoryEstimate
    from dpo_video.settings import TrainSettings

    device = torch.device("cpu" if rehearse else "cuda")
    named = {"animatediff": memory.ANIMATEDIFF, "wan-1.3b": memory.WAN}[case]
    rows = json.loads((RESULTS / "memory.json").read_text())
    needs = [MemoryEstimate.model_validate(row["need"]) for row in rows if row["model"] == named]
    needs = [need for need in needs if need.mode.quantization != "nf4"]
    needs.sort(key=lambda need: need.total)
    capacity = torch.cuda.get_device_properties(device).total_memory if not rehearse else 64 * GIB
    backbone, settings = memory.MODELS[named]
    found: dict[str, Any] = {"rows": []}
    for need in needs[:2] if rehearse else needs:
        row: dict[str, Any] = {"mode": str(need.mode), "brief": need.mode.brief()}
        row |= {"predicted": need.tensors, "predicted_card": need.total, "flops": need.flops}
        if need.tensors > capacity:
            row["skipped"] = "predicted not to fit the card"
        elif rehearse:
            row["skipped"] = "rehearsal"
        else:
            row |= steps.measured(backbone, settings, need.mode, device)
        found["rows"].append(row)
        save(found)
    if not rehearse:
        found["context"] = steps.context(device)
    else:
        found["rows"].append(steps.measured(Tiny(), TrainSettings(rank=4), needs[0].mode, device))
    return found


def part_tiers(out: Path, rehearse: bool) -> dict[str, Any]:
    """The memory suite of bench_memory.py, for the presets of this card."""
    which = "wan-1.3b and toggle-blocks-joint" if rehearse else "preset and (animatediff or 1.3b)"
    tier = ["--tier", "l4", "--quick"] if rehearse else ["--tier", "auto", "--rounds", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench", "memory", *tier, "--only", which,
         "--out", str(out / "tiers")], cwd=REPOSITORY, text=True, capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stdout[-1500:] + done.stderr[-1500:])
    found: dict[str, Any] = json.loads((out / "tiers" / "memory.json").read_text())
    return found


def part_metrics(rehearse: bool) -> dict[str, Any]:
    """Seconds per video of every metric, at AnimateDiff's and Wan's sizes; and one video's value
    on the GPU and on the CPU."""
    import torch

    from dpo_video import registry
    from dpo_video.testing import small_videos

    device = torch.device("cpu" if rehearse else "cuda")
    sizes = [(5, 64, 64)] if rehearse else [(16, 512, 512), (81, 480, 832)]
    found: dict[str, Any] = {}
    for name in ("warp_error", "frame_difference", "dynamic_degree", "sharpness"):
        metric: Any = registry.load("metric", name)()
        for size in sizes:
            videos = small_videos(1, *size).to(device)
            times = []
            for _ in range(2 if rehearse else 4):
                began = time.perf_counter()
                value = float(metric(videos, [""])[0])
                times.append(time.perf_counter() - began)
            row = {"seconds": median(times[1:]), "first": times[0], "value": value}
            if size == sizes[0]:
                began = time.perf_counter()
                row["value_cpu"] = float(metric(videos.cpu(), [""])[0])
                row["seconds_cpu"] = time.perf_counter() - began
            found[f"{name}, {'x'.join(map(str, size))}"] = row
    return found


def part_compile(case: str, rehearse: bool) -> dict[str, Any]:
    """Seconds of a step with blocks checkpointed, eager and compiled."""
    import torch

    from benchmarks import memory
    from benchmarks.support import steps
    from benchmarks.support.small_models import small_wan
    from dpo_video.estimation.modes import MemoryMode

    named = {"animatediff": memory.ANIMATEDIFF, "wan-1.3b": memory.WAN}[case]
    backbone, settings = memory.MODELS[named]
    mode = MemoryMode(reference="toggle", checkpointing="blocks", backward="linear")
    if rehearse:
        settings = settings.model_copy(update={"mixed_precision": "no"})
        with tempfile.TemporaryDirectory() as folder:
            model = small_wan(Path(folder) / "wan", torch.device("cpu"), quick=True)
        small = steps.prepared(model, settings, mode, compiled=case == "wan-1.3b")
        began = time.perf_counter()
        small.optimize()
        return {"small": {"first_step_seconds": time.perf_counter() - began}}
    device = torch.device("cuda")
    return {
        which: steps.measured(backbone, settings, mode, device, compiled=which != "eager")
        for which in ("eager", "compiled")
    }


def run_part(name: str, out: Path, rehearse: bool) -> None:
    """Run one part and write its result to a file of its own."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    target = out / f"{name.replace(' ', '-')}.json"

    def save(found: Any) -> None:
        target.write_text(json.dumps(found, indent=1) + "\n")

    kind, _, case = name.partition(" ")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": lambda: part_tests(out, rehearse),
        "demo": lambda: part_demo(out, rehearse, save),
        "memory": lambda: part_memory(case, rehearse, save),
        "tiers": lambda: part_tiers(out, rehearse),
        "metrics": lambda: part_metrics(rehearse),
        "compile": lambda: part_compile(case, rehearse),
    }
    save(parts[kind]())


def limited(name: str, out: Path, rehearse: bool, limit: float) -> dict[str, Any]:
    """Run a part in its own process; its result, seconds, and error if it failed."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.gpu", "--inside", name, "--out", str(out)]
    error = None
    try:
        done = subprocess.run(
            command + (["--rehearse"] if rehearse else []), cwd=REPOSITORY, text=True,
            capture_output=True, timeout=limit, check=False,
        )  # fmt: skip
        if done.returncode:
            error = (done.stdout[-1000:] + done.stderr[-2500:]).strip()
    except subprocess.TimeoutExpired:
        error = f"stopped after {limit:.0f} seconds"
    path = out / f"{name.replace(' ', '-')}.json"
    found = {"seconds": round(time.perf_counter() - began, 1)}
    found |= {"result": json.loads(path.read_text())} if path.exists() else {}
    found |= {"error": error} if error else {}
    print(f"--- {name}: {json.dumps(found)[:3500]}", flush=True)
    return found


def machine(rehearse: bool) -> dict[str, Any]:
    """What was measured on."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(), "rehearsal": rehearse,
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "accelerate")},
    }  # fmt: skip
    if not rehearse:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": torch.cuda.get_device_name(), "memory": properties.total_memory,
            "cuda": torch.version.cuda, "rates": rates(),
        }  # fmt: skip
    return found


def rates() -> dict[str, float]:
    """Measured ceilings: TFLOP/s of a large bf16 matrix product, GB/s of copies."""
    import torch

    def seconds(call: Callable[[], object], times: int = 10) -> float:
        call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / times

    size = 8192
    matrix = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    block = torch.randn(2**28, device="cuda")
    pinned = torch.empty(2**26, pin_memory=True)
    return {
        "bf16_tflops": 2 * size**3 / seconds(lambda: matrix @ matrix) / 1e12,
        "copy_gbytes": 2 * block.nbytes / seconds(lambda: block.clone()) / 1e9,
        "to_host_gbytes": pinned.nbytes
        / seconds(lambda: pinned.copy_(block[: 2**26], non_blocking=True))
        / 1e9,
    }


def markdown(found: dict[str, Any]) -> str:
    """The measured rows as a table."""
    from dpo_video.estimation.results import GIB

    here = found["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in here["versions"].items())
    lines = [f"{here.get('card', 'rehearsal on a CPU')}, {versions}.", ""]
    rates_here = here.get("rates", {})
    if rates_here:
        lines += [
            f"Measured ceilings: {rates_here['bf16_tflops']:.0f} TFLOP/s (bf16 matrix product), "
            f"{rates_here['copy_gbytes']:,.0f} GB/s (copy), "
            f"{rates_here['to_host_gbytes']:.0f} GB/s (to pinned CPU memory).",
            "",
        ]
    lines += [
        "| model | mode | predicted, GiB | measured, GiB | error | s per pair | TFLOP/s "
        "| of the matrix product |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, part in found["parts"].items():
        for row in part.get("result", {}).get("rows", []):
            if "bytes" not in row or "flops" not in row:
                continue
            rate = row["flops"] / row["seconds_per_pair"] / 1e12
            lines.append(
                f"| {name.removeprefix('memory ')} | {row['brief']} | {row['predicted'] / GIB:.2f} "
                f"| {row['bytes'] / GIB:.2f} | {row['predicted'] / row['bytes'] - 1:+.1%} "
                f"| {row['seconds_per_pair']:.2f} | {rate:.0f} "
                f"| {rate / rates_here['bf16_tflops']:.0%} |"
            )
    failed = [f"- {name}: {part['error']}" for name, part in found["parts"].items()
              if "error" in part]  # fmt: skip
    return "\n".join(lines + (["", "Not finished:", *failed] if failed else [])) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", action="append", help="only parts that begin with this")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with small models")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        run_part(given.inside, given.out, given.rehearse)
        return
    out: Path = given.out or (Path(tempfile.mkdtemp()) if given.rehearse else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp())
    wanted = tuple(given.part or [""])
    found: dict[str, Any] = {"machine": machine(given.rehearse), "parts": {}}
    print(json.dumps(found["machine"]), flush=True)

    def done(name: str, result: dict[str, Any]) -> None:
        if name == "tiers" and "result" in result:
            suite = SuiteResult.model_validate(result.pop("result"))
            card = "-".join(suite.device.lower().replace("nvidia", "").split())
            write_result(out / "bench" / card, suite)
        found["parts"][name] = result
        (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")

    def run(name: str) -> None:
        scale = 10 if given.rehearse else 1
        done(name, limited(name, scratch, given.rehearse, scale * LIMITS[name]))

    for name in ALONE:
        if name.startswith(wanted):
            run(name)
    with ThreadPoolExecutor() as pool:
        list(pool.map(run, [name for name in TOGETHER if name.startswith(wanted)]))
    (out / "gpu.md").write_text(markdown(found))
    log = scratch / "tests.log"
    if log.exists():
        (out / "gpu_tests.log").write_text(log.read_text())
    failed = [name for name, part in found["parts"].items() if "error" in part]
    failed += [n for n, p in found["parts"].items() if p.get("result", {}).get("failed")]
    print(f"Results: {out}/gpu.json" + (f". Failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
