"""Adapters in an evaluation: one that has diverged, and one that the base model has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import load_small

from dpo_video.errors import RunError
from dpo_video.evaluation.adapter import put_on
from dpo_video.evaluation.evaluate import measure
from dpo_video.metric.frame_difference import FrameDifference
from dpo_video.settings import EvaluateSettings, TrainSettings
from dpo_video.training.lora import adapt
from dpo_video.types import Prompt


def test_a_diverged_adapter_is_refused(small_folder: Path, tmp_path: Path) -> None:
    policy = adapt(load_small(small_folder), TrainSettings(rank=2), 0)
    policy.save_pretrained(tmp_path / "sound")
    put_on(load_small(small_folder), tmp_path / "sound")
    next(p for p in policy.parameters() if p.requires_grad).data.fill_(torch.nan)
    policy.save_pretrained(tmp_path / "broken")
    with pytest.raises(RunError, match=r"broken' is not finite .*lora_.* earlier checkpoint"):
        put_on(load_small(small_folder), tmp_path / "broken")


def test_a_run_from_a_lora_is_compared_with_the_model_that_has_it(
    small_folder: Path, tmp_path: Path
) -> None:
    for seed, name in enumerate(("first", "second")):
        policy = adapt(load_small(small_folder), TrainSettings(rank=2), 0)
        torch.manual_seed(seed)
        for key, parameter in policy.named_parameters():
            if ".lora_B" in key:
                parameter.data = torch.randn_like(parameter)
        policy.save_pretrained(tmp_path / name)

    def videos(start: str | None, adapter: str) -> list[bytes]:
        out = tmp_path / f"{start}-{adapter}"
        measure(
            load_small(small_folder), tmp_path / adapter,
            {"frame_difference": FrameDifference()},
            [Prompt(text=text, seed=0) for text in ("a red square", "a blue disc")],
            EvaluateSettings(num_inference_steps=2), out,
            start=tmp_path / start if start else None,
        )  # fmt: skip
        return [(out / f"000-{side}.mp4").read_bytes() for side in ("base", "tuned")]

    base, tuned = videos("first", "first")
    assert base == tuned
    again, second = videos("first", "second")
    plain, _ = videos(None, "second")
    assert again == base and len({base, second, plain}) == 3
