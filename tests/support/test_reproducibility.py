"""Two runs are equal to the bit, and what cannot be repeated is refused in one sentence."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, Install

from dpo_video.cli import main
from dpo_video.errors import UserError
from dpo_video.support.reproducibility import refusal, settle

# `put_` is one of the few operations that torch cannot repeat on a CPU either.
UNREPEATABLE = '''
import torch
from dpo_video.loss.global_ import Global
from dpo_video.strategies import Loss

class Careless(Loss):
    """Writes somewhere, in no order."""

    def __call__(self, errors):
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
        return Global()(errors)
'''


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The kernels of the other tests."""
    yield
    settle(False)


def train(folder: Path, small: Path, *more: str) -> int:
    """The program as the shell runs it, in this process; its exit code."""
    arguments = [
        "train",
        "--backbone=animatediff",
        f"--set=backbone.model={small}",
        "--device=cpu",
        f"--set=backbone.frames={SHAPE.frames}",
        f"--set=backbone.height={SHAPE.height}",
        f"--set=backbone.width={SHAPE.width}",
        "--pairs=jitter",
        "--set=pairs.num_inference_steps=2",
        "--loss=global",
        "--metric=frame_difference",
        "--count=1",
        "--steps=3",
        "--set=train.gradient_accumulation_steps=1",
        "--set=train.rank=2",
        "--set=train.validation_videos=0",
        "--set=train.report_to=none",
        f"--out={folder}",
    ]
    sys.argv = ["dpo-video", *arguments, *more]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_two_runs_are_equal_to_the_bit_and_say_how_they_ran(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(sys, "argv", [])
    files = []
    for name in ("one", "two"):
        folder = tmp_path / name / "run"
        assert train(folder, small_folder, "--deterministic") == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert tomllib.loads((folder / "run.toml").read_text())["run"]["deterministic"] is True
        folders = (
            folder / "checkpoints/step_000003/adapter",
            *folder.parent.glob("pairs/jitter-*"),
        )
        files.append(
            {
                path.relative_to(folder.parent): path.read_bytes()
                for path in sorted(path for each in folders for path in each.rglob("*"))
                if path.suffix == ".safetensors"
            }
        )
    # Latents, the prompt, the negative prompt, and the adapter.
    assert len(files[0]) == 4 and files[0] == files[1]


def test_an_operation_that_cannot_be_repeated_is_named(
    install: Install,
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("COLUMNS", "300")
    install("dpo-careless", UNREPEATABLE, "careless", "Careless")
    assert train(tmp_path / "a", small_folder, "--loss=careless", "--steps=1") == 0
    capfd.readouterr()
    code = train(tmp_path / "b", small_folder, "--loss=careless", "--steps=1", "--deterministic")
    told = capfd.readouterr().err.splitlines()[-1]
    assert code == 2 and told.startswith("Error: 'put_' has no deterministic kernel"), told
    assert "Omit --deterministic" in told


def test_other_errors_are_none_of_its_business() -> None:
    assert refusal(RuntimeError("shapes do not match")) is None
    # As torch says it on a GPU, where its own next step would send people to the shell.
    cublas = RuntimeError(
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` "
        "or `at::Context::setDeterministicAlgorithms(true)`, but this operation is not "
        "deterministic because it uses CuBLAS and you have CUDA >= 10.2."
    )
    assert "'cuBLAS' has no deterministic kernel" in str(refusal(cublas))


def test_an_environment_that_asks_for_other_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match="it is set to ':0:0'"):
        settle(True)
    settle(False)
