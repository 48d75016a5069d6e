"""What the command line imports before a command runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_video
from dpo_video.cli import WAITING, main

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "kornia", "cv2", "numpy")


def run(arguments: list[str], code: int) -> subprocess.CompletedProcess[str]:
    """Run a command that ends with this code, and print what it has imported of `HEAVY`."""
    program = f"""
import sys
sys.argv = ["dpo-video", *{arguments!r}]
from dpo_video.cli import main
try:
    main()
except SystemExit as stop:
    assert (stop.code or 0) == {code}, stop.code
print("imported:", *sorted(set({HEAVY}) & sys.modules.keys()), file=sys.stderr)
"""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "loss", "--json"], ["train", "--help"]]
)
def test_help_and_list_import_no_torch(arguments: list[str]) -> None:
    done = run(arguments, code=0)
    assert done.stdout
    assert done.stderr.strip() == "imported:"


@pytest.mark.parametrize(
    ("chosen", "policy"),
    [({}, "passive"), ({"GOMP_SPINCOUNT": "9"}, None), ({"OMP_WAIT_POLICY": "active"}, "active")],
)
def test_waiting_threads_sleep_before_torch_is_imported_unless_the_user_chose(
    chosen: dict[str, str], policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in WAITING:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["dpo-video", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["train", "--loss=globl"], "global"),
        (["train", "--pairs=lokal"], "local"),
        (["build", "--backbone=animatedif"], "animatediff"),
        (["train", "--metric=warp_eror"], "warp_error"),
        (["estimate", "--tier=4091"], "4090"),
        (["config", "--config=typo.toml"], "toggle"),
    ],
)
def test_a_typo_in_a_name_is_told_before_torch_is_imported(
    arguments: list[str], near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(dpo_video.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    Path("typo.toml").write_text('[reference]\nname = "togle"\n')
    done = run(arguments, code=2)
    assert f"Did you mean '{near}'?" in done.stderr
    assert done.stderr.splitlines()[-1].strip() == "imported:"
