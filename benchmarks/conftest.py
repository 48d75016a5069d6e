"""Fixtures of the timed suites, which `dpo-video bench` runs. README.md has the measuring contract.

A suite is a file `bench_SUITE.py`. Its tests take `measure` and `candidate` and are marked with the
names of the candidates:

    @pytest.mark.candidates("ours", "theirs")
    def test_flow(measure: Measure, candidate: str) -> None:
        measure("optical flow", CALLS[candidate], unit="frame pair", work=15, baseline="theirs")

Each test item is one round of one candidate. Rounds are the outer loop, so the order is ours,
theirs, ours, theirs. pytest-benchmark times the call; benchmarks.support.results combines the
rounds.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

THREADS = int(os.environ.get("DPO_VIDEO_BENCH_THREADS", "1"))
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = str(THREADS)  # before any import reads them
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from pytest_benchmark.fixture import BenchmarkFixture  # noqa: E402

import dpo_video  # noqa: E402
from benchmarks.support.rounds import MISSING, Measure  # noqa: E402

WARMED: set[tuple[str, str]] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=7, help="Rounds per candidate.")
    parser.addoption("--clock", choices=["wall", "cpu"], default="wall", help="Clock to read.")
    parser.addoption("--quick", action="store_true", help="Smallest sizes, as a trial run.")
    parser.addoption("--tier", help="Of the memory suite, only the tests of this card.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "candidates(*names): the candidates of a group")
    torch.set_num_threads(THREADS)
    if config.getoption("--clock") == "cpu" and torch.cuda.is_available():
        raise pytest.UsageError("--clock cpu does not count a GPU's time. Use --clock wall.")
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(THREADS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("candidates")
    if mark is not None:
        metafunc.parametrize("round_index", range(metafunc.config.getoption("--rounds")))
        metafunc.parametrize("candidate", mark.args)


def cpu_clock() -> float:
    """Processor seconds of this process and of its ended children."""
    import resource

    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--clock") == "cpu":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=cpu_clock))


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def measure(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, candidate: str,
    round_index: int, device: torch.device,
) -> Measure:  # fmt: skip
    suite = Path(request.path).stem.removeprefix("bench_")

    def run(
        group: str, call: Callable[[], Any], *, unit: str, baseline: str, work: float = 1,
        flops: float | None = None, figures: Mapping[str, float | str] | None = None,
        calls: int = 1,
    ) -> None:  # fmt: skip
        def finished() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.extra_info.update(
            suite=suite, group=group, candidate=candidate, unit=unit, baseline=baseline,
            work=work, flops=flops, figures=dict(figures or {}),
        )  # fmt: skip
        torch.manual_seed(0)
        first = (group, candidate) not in WARMED
        WARMED.add((group, candidate))
        benchmark.pedantic(finished, rounds=1, iterations=calls, warmup_rounds=int(first))

    return run


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    output_json["dpo_video"] = {
        "machine": f"{cores} cores, {platform.machine()}",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": THREADS,
        "clock": config.getoption("--clock"),
        "versions": {
            "dpo-video": dpo_video.__version__, "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "quick": config.getoption("--quick"),
        "missing": MISSING,
    }  # fmt: skip
