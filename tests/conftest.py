"""A minimal AnimateDiff of the real classes, random weights, saved and loaded back by path."""
# ruff: noqa: E402 - the hook must be in place before what it checks is imported

from __future__ import annotations

import gc
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["OMP_NUM_THREADS"] = "1"  # in the commands that tests start too

from pathlib import Path

from jaxtyping import install_import_hook

# Shapes and types are checked in the first calls of every test, here and never in production, in
# the modules that handle tensors: what is plain Python, mypy knows. Left out are the command line,
# which imports what it names in annotations for type checkers alone, to stay light; modules that
# torch.compile traces, where it would compile the checks, whose state is never the same; and those
# that run at every operation, where the checks would take most of the time.
PACKAGE = Path(__file__).parents[1] / "dpo_video"
TENSORS = re.compile(r"\b(jaxtyping|Tensor|Videos|PerPair)\b")
COMPILED, EVERY_OPERATION = {"hooks", "peft_autocast"}, {"memoryless", "peak", "cuda_autocast"}
CHECKED = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent.name != "cli"
    and path.stem not in {"__init__", *COMPILED, *EVERY_OPERATION}
    and TENSORS.search(path.read_text())
]
install_import_hook(CHECKED, "checked.typed")

import checked
import diffusers
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from hypothesis import settings
from small_animatediff import CPU, SHAPE, load_small, save_small_animatediff

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.cli import main
from dpo_video.registry import entry_points as entries
from dpo_video.testing import small_videos
from dpo_video.types import Clip

# nohup and `command &` ignore these, also in the commands that tests start and stop by them.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # no test is timed
settings.load_profile("untimed")
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

__all__ = ["CPU", "SHAPE", "load_small"]  # imported from here by the tests

Install = Callable[..., None]
Said = Callable[..., str]


# In this order pytest-xdist hands files out: none of these is left to one process at the end.
LONG = [
    "test_notebooks", "test_end_to_end", "test_dynamic_degree", "test_loop", "test_plugins",
    "test_page", "test_processes", "test_reference_cache", "test_contracts", "test_step",
    "test_compare", "test_compile", "test_estimate",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take longest first."""
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


def pytest_runtest_setup() -> None:
    """Check the shapes of the first calls again."""
    checked.start_test()


def pytest_collection_finish() -> None:
    """Keep the imported libraries out of garbage collection, which took a third of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: 4 frames at 16x16, 4x4 latents."""
    return save_small_animatediff(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def small_cogvideox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CogVideoX checkpoint folder: see small_cogvideox.py for its options and other layouts."""
    from small_cogvideox import save_small_cogvideox

    return save_small_cogvideox(tmp_path_factory.mktemp("small_cogvideox"))


@pytest.fixture
def small_model(small_folder: Path) -> AnimateDiffModel:
    """A fresh copy of the small model: tests may put adapters on it."""
    return load_small(small_folder)


@pytest.fixture
def quick_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cruder optical flow, for tests that look at no value measured with it."""
    from dpo_video.metric import _flow, dynamic_degree

    monkeypatch.setattr(_flow, "ITERATIONS", (1, 1))
    monkeypatch.setattr(dynamic_degree, "_rematch", lambda videos, paths: paths)


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def clip() -> Clip:
    """A random texture at the small model's shape."""
    video = small_videos(1, SHAPE.frames, SHAPE.height, SHAPE.width)[0]
    return Clip(name="random", caption="a red square moving left slowly", video=video)


@pytest.fixture
def said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Said:
    """Run a command that ends with this code; what it says, beside its result in `said.out`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

    def command(code: int, *arguments: str | Path) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", ["dpo-video", *map(str, arguments)])
        try:
            main()
            ended = 0
        except SystemExit as stop:
            ended = int(stop.code or 0)
        told = capfd.readouterr()
        assert ended == code, told.err
        command.out = told.out  # type: ignore[attr-defined]
        return told.err

    return command


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution of one module and one entry point on the path, as pip would."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(distribution: str, source: str, name: str, cls: str, kind: str = "loss") -> None:
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(f"[dpo_video.{kind}]\n{name} = {module}:{cls}\n")
        importlib.invalidate_caches()
        entries.forget()

    yield add
    entries.forget()
