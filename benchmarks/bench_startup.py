"""How long a command takes that does no work, beside Python itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import Turn

PYTHON, TORCH = "python -c pass", "python -c 'import torch'"
COMMANDS = {
    "dpo-video --help": ["--help"],
    "dpo-video list": ["list"],
    "dpo-video show loss region": ["show", "loss", "region"],
    "dpo-video config": ["config"],
}


@pytest.mark.contestants(*COMMANDS, PYTHON, TORCH)
def test_startup(turn: Turn, contestant: str) -> None:
    if contestant in COMMANDS:
        arguments = ["-m", "dpo_video", *COMMANDS[contestant]]
    else:
        arguments = ["-c", "pass" if contestant == PYTHON else "import torch"]

    def call() -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    turn("start of a command", call, unit="start", yardstick=TORCH)
