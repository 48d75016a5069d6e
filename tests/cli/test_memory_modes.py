"""A run on a quantized base, from the command line to its model card."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Said
from small_wan import OPTIONS, save_small_wan

from dpo_video.data.store import PairStore

MODES = ["quantization=int8", "offload=blocks, checkpoints, optimizer", "checkpointing=blocks",
         "backward=split", "forward_chunks=2"]  # fmt: skip
QUICK = ["rank=2", "gradient_accumulation_steps=1", "validation_videos=0", "learning_rate=0.1",
         "report_to=none", "warmup_steps=0"]  # fmt: skip


def test_the_quantization_is_named_in_notes_evaluation_and_card(tmp_path: Path, said: Said) -> None:
    model = [f"--set=backbone.{name}={value}" for name, value in OPTIONS.items()]
    model += [
        "--backbone=wan",
        f"--set=backbone.model={save_small_wan(tmp_path / 'wan')}",
        "--device=cpu",
    ]
    said(0, "build", "--pairs=jitter", "--count=2", "--set=pairs.num_inference_steps=1", *model,
         "--out", tmp_path / "pairs")  # fmt: skip
    assert "+" not in PairStore(tmp_path / "pairs").manifest.identity
    run = tmp_path / "run"
    options = [*(f"memory.{mode}" for mode in MODES), *(f"train.{option}" for option in QUICK)]
    # The pairs come from the native base; training and evaluation use the quantized one.
    told = said(0, "train", "--pairs", tmp_path / "pairs", "--loss=global", "--steps=2", *model,
                "--metric=frame_difference", *(f"--set={option}" for option in options),
                "--out", run)  # fmt: skip
    assert "The base model is quantized to int8" in told
    assert json.loads((run / "log.jsonl").read_text().splitlines()[0])["margin"] == 0
    said(0, "evaluate", run, "--num-prompts=2", "--set=evaluate.num_inference_steps=1")
    facts = json.loads((run / "evaluation" / "evaluation.json").read_text())["facts"]
    assert facts["Base quantized to"] == "int8"
    said(0, "export", run)
    card = (run / "export" / "diffusers-2" / "README.md").read_text()
    assert "| quantization | base weights in int8 during training |" in card
    refused = said(2, "export", run, "--format=merged")
    assert "trained on a base in int8" in refused and refused.count("\n") == 1
