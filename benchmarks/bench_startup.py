"""Start-up time of commands; baseline: `import torch`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.support.rounds import Measure

PYTHON, TORCH = "python -c pass", "python -c 'import torch'"
COMMANDS = {
    "dpo-video --help": ["--help"],
    "dpo-video list": ["list"],
    "dpo-video show loss region": ["show", "loss", "region"],
    "dpo-video config": ["config"],
}


@pytest.mark.candidates(*COMMANDS, PYTHON, TORCH)
def test_startup(measure: Measure, candidate: str) -> None:
    if candidate in COMMANDS:
        arguments = ["-m", "dpo_video", *COMMANDS[candidate]]
    else:
        arguments = ["-c", "pass" if candidate == PYTHON else "import torch"]

    def call() -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    measure("start of a command", call, unit="start", baseline=TORCH)
