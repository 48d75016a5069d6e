"""How much a training step needs in each memory mode, predicted on shapes at full size.

    OMP_NUM_THREADS=1 python benchmarks/memory.py

The step is the one that trains, on tensors without memory (dpo_video.fit), so the figures are the
same on any machine. Nothing here was measured on a GPU: its context, its libraries' workspaces and
what its allocator loses to fragments come on top; "on a card" adds what fit assumes of them.
Half precision is autocast, as `train.precision` has it: norms run in fp32, and what they are given
is kept in fp32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from dpo_video.backbone.animatediff import AnimateDiff
from dpo_video.backbone.wan import Wan
from dpo_video.fit import GIB, Forecast, Mode, Need, forecast, ladder
from dpo_video.loss.global_ import Global
from dpo_video.reference.copy import Copy
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Backbone, Reference
from dpo_video.tiers import tiers

RESULTS = Path(__file__).parent / "results" / "0.1.0"
REFERENCES: dict[str, Reference] = {"toggle": Toggle(), "copy": Copy()}

ANIMATEDIFF = "SD1.5 + AnimateDiff v1.5.2, 4x16x64x64, fp16, rank 32"
WAN = "Wan2.1-1.3B, 81 frames 480p, bf16, rank 64"
WAN_14B = "Wan2.1-14B, 81 frames 480p, bf16, rank 32"
MODELS: dict[str, tuple[Backbone, TrainSettings]] = {
    ANIMATEDIFF: (
        AnimateDiff(model="sd1.5", motion_adapter="animatediff-v1-5-2"),
        TrainSettings(rank=32, precision="fp16", accumulation=1),
    ),
    WAN: (
        Wan(model="wan2.1-t2v-1.3b", frames=81, height=480, width=832),
        TrainSettings(rank=64, precision="bf16", accumulation=1),
    ),
    WAN_14B: (
        Wan(model="wan2.1-t2v-14b", frames=81, height=480, width=832),
        TrainSettings(rank=32, precision="bf16", accumulation=1),
    ),
}


class Row(BaseModel):
    """One mode of one model."""

    predicted: Literal[True] = True
    model: str
    need: Need
    seconds: float
    """That the prediction took."""


def rows(only: str) -> Iterator[Row]:
    for model, (backbone, settings) in MODELS.items():
        if only not in model:
            continue
        for mode in ladder(list(REFERENCES), Global()):
            began = time.monotonic()
            need = predicted(backbone, settings, mode).needs[0]
            yield Row(model=model, need=need, seconds=round(time.monotonic() - began, 1))


def predicted(backbone: Backbone, settings: TrainSettings, mode: Mode) -> Forecast:
    reference = {mode.reference: REFERENCES[mode.reference]}
    return forecast(backbone, reference, Global(), settings, modes=[mode])


def shown(found: list[Row]) -> Table:
    table = Table(title="Predicted peaks of one step, GiB")
    for name in ("model", "mode"):
        table.add_column(name)
    for name in ("weights", "activations", "all", "host", "TFLOP", "on a card", "smallest"):
        table.add_column(name, justify="right")
    cards = sorted(tiers().values(), key=lambda card: card.memory_gib)
    for row in found:
        need = row.need
        fits = (card.name for card in cards if need.card <= card.memory_gib * GIB)
        table.add_row(
            row.model.split(",")[0], str(need.mode), f"{need.weights / GIB:.2f}",
            f"{need.activations / GIB:.2f}", f"{need.tensors / GIB:.2f}", f"{need.host / GIB:.1f}",
            f"{need.flops / 1e12:.0f}", f"{need.card / GIB:.1f}", next(fits, "none"),
        )  # fmt: skip
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of a model's name")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for row in rows(options.only):
        found.append(row)
        size, work = f"{row.need.tensors / GIB:.2f} GiB", f"{row.need.flops / 1e12:.0f} TFLOP"
        print(row.model[:12], row.need.mode, size, work, f"{row.seconds:.0f} s", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([each.model_dump(mode="json") for each in found], indent=1)
        options.out.write_text(text + "\n")
    Console(width=140).print(shown(found))
