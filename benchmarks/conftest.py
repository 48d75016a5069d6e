"""Contestants take turns. `dpo-video bench SUITE` is the way in; see README.md for the contract.

A suite is a file `bench_SUITE.py`. Its tests take `turn` and `contestant`, and are marked with the
contestants' names:

    @pytest.mark.contestants("ours", "theirs")
    def test_flow(turn: Turn, contestant: str) -> None:
        turn("optical flow", CALLS[contestant], unit="frame pair", work=15, yardstick="theirs")

Every test is one turn of one contestant, and the rounds are the outer loop, so that the order is
ours, theirs, ours, theirs. pytest-benchmark times the call; benchmarks.support.results puts the
turns together.
"""

from __future__ import annotations

import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

THREADS = int(os.environ.get("DPO_VIDEO_BENCH_THREADS", "1"))
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = str(THREADS)  # before anything reads them
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from pytest_benchmark.fixture import BenchmarkFixture  # noqa: E402

import dpo_video  # noqa: E402

WARMED: set[tuple[str, str]] = set()
MISSING: dict[str, dict[str, str]] = defaultdict(dict)


class Turn(Protocol):
    """Times one turn of the test's contestant."""

    def __call__(
        self,
        race: str,
        call: Callable[[], Any],
        *,
        unit: str,
        yardstick: str,
        work: float = 1,
        flops: float | None = None,
        figures: Mapping[str, float | str] | None = None,
        calls: int = 1,
    ) -> None:
        """Time `call`, after one that does not count if it is the contestant's first turn.

        Args:
            race: The race's name.
            call: What is timed.
            unit: Of work.
            yardstick: The contestant that the others are measured by.
            work: Units of work in one call.
            flops: Operations in one unit of work.
            figures: What else is known of the contestant.
            calls: How often it is called in a turn, where one call is too short to time.
        """


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--turns", type=int, default=7, help="Turns of each contestant.")
    parser.addoption("--clock", choices=["wall", "cpu"], default="wall", help="What is read.")
    parser.addoption("--quick", action="store_true", help="The smallest sizes: does it run?")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "contestants(*names): who takes turns")
    torch.set_num_threads(THREADS)
    if config.getoption("--clock") == "cpu" and torch.cuda.is_available():
        raise pytest.UsageError("--clock cpu does not see what a GPU does. Take --clock wall.")
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(THREADS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("contestants")
    if mark is not None:
        metafunc.parametrize("turns_before", range(metafunc.config.getoption("--turns")))
        metafunc.parametrize("contestant", mark.args)


def cpu_clock() -> float:
    """Seconds that processors worked for this process and for its children that have ended."""
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
def turn(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, contestant: str,
    turns_before: int, device: torch.device,
) -> Turn:  # fmt: skip
    suite = Path(request.path).stem.removeprefix("bench_")

    def run(
        race: str, call: Callable[[], Any], *, unit: str, yardstick: str, work: float = 1,
        flops: float | None = None, figures: Mapping[str, float | str] | None = None,
        calls: int = 1,
    ) -> None:  # fmt: skip
        def finished() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.extra_info.update(
            suite=suite, race=race, contestant=contestant, unit=unit, yardstick=yardstick,
            work=work, flops=flops, figures=dict(figures or {}),
        )  # fmt: skip
        torch.manual_seed(0)
        first = (race, contestant) not in WARMED
        WARMED.add((race, contestant))
        benchmark.pedantic(finished, rounds=1, iterations=calls, warmup_rounds=int(first))

    return run


def needs(race: str, contestant: str, module: str, suite: str) -> None:
    """Skip a contestant whose library is not installed, and have the results say so."""
    try:
        __import__(module)
    except ImportError:
        reason = f"{module} is not installed"
        MISSING[f"{suite}/{race}"][contestant] = reason
        pytest.skip(reason)


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
