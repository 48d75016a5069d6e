"""Base against tuned: what a training has left behind is evaluated, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import load_small

from dpo_video.errors import RunError
from dpo_video.evaluation.evaluate import merged
from dpo_video.settings import TrainSettings
from dpo_video.training.lora import adapt


def test_an_adapter_that_has_diverged_is_not_merged(small_folder: Path, tmp_path: Path) -> None:
    policy = adapt(load_small(small_folder), TrainSettings(rank=2), 0)
    policy.save_pretrained(tmp_path / "sound")
    merged(load_small(small_folder), tmp_path / "sound")
    next(p for p in policy.parameters() if p.requires_grad).data.fill_(torch.nan)
    policy.save_pretrained(tmp_path / "broken")
    with pytest.raises(RunError, match=r"broken' cannot be merged .*NaN.* earlier checkpoint"):
        merged(load_small(small_folder), tmp_path / "broken")
