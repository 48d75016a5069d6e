"""What the command line imports before a command runs."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "loss", "--json"], ["train", "--help"]]
)
def test_help_and_list_import_no_torch(arguments: list[str]) -> None:
    program = f"""
import sys
sys.argv = ["dpo-video", *{arguments!r}]
from dpo_video.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"torch", "diffusers", "transformers", "peft", "accelerate", "kornia", "cv2", "numpy"}}
print(*sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout
    assert done.stderr.strip() == ""
