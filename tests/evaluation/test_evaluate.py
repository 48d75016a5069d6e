"""An adapter that has diverged is refused with a next step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import load_small

from dpo_video.errors import RunError
from dpo_video.evaluation.adapter import put_on
from dpo_video.settings import TrainSettings
from dpo_video.training.lora import adapt


def test_a_diverged_adapter_is_refused(small_folder: Path, tmp_path: Path) -> None:
    policy = adapt(load_small(small_folder), TrainSettings(rank=2), 0)
    policy.save_pretrained(tmp_path / "sound")
    put_on(load_small(small_folder), tmp_path / "sound")
    next(p for p in policy.parameters() if p.requires_grad).data.fill_(torch.nan)
    policy.save_pretrained(tmp_path / "broken")
    with pytest.raises(RunError, match=r"broken' is not finite .*lora_.* earlier checkpoint"):
        put_on(load_small(small_folder), tmp_path / "broken")
