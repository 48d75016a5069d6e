"""Memory of a training step in each memory mode, predicted on shapes at full size.

    OMP_NUM_THREADS=1 python -m benchmarks.memory            # a table, memory.json, memory.svg
    OMP_NUM_THREADS=1 python -m benchmarks.memory --keep     # only the rows that the file lacks

The training step runs on tensors without storage (dpo_video.estimation), so the numbers are equal
on any machine. Nothing was measured on a GPU: its context, library workspaces and fragmentation of
its allocator come on top; the column "on a card" includes the assumptions of `dpo-video estimate`
about them. In addition to the modes of `dpo-video estimate`, each card has rows with the fewest
checkpointed blocks that fit it. Half precision is autocast, as in `train.mixed_precision`: norms
run in fp32 and save fp32 inputs.
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

from benchmarks.support.plots import Panel, Spot, peaks
from dpo_video.backbone.animatediff import AnimateDiff
from dpo_video.backbone.cogvideox import CogVideoX
from dpo_video.backbone.wan import Wan
from dpo_video.estimation.estimate import estimate_memory
from dpo_video.estimation.fewest_blocks import BUDGET_SHARE, fewest_blocks
from dpo_video.estimation.modes import MemoryMode, candidate_modes
from dpo_video.estimation.results import GIB, MemoryEstimate
from dpo_video.estimation.tiers import tiers
from dpo_video.estimation.tracing import TraceCache
from dpo_video.loss.global_ import Global
from dpo_video.reference.copy import Copy
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Backbone, Reference

RESULTS = Path(__file__).parent / "results" / "0.1.0"
REFERENCES: dict[str, Reference] = {"toggle": Toggle(), "copy": Copy()}

ANIMATEDIFF = "SD1.5 + AnimateDiff v1.5.2, 4x16x64x64, fp16, rank 32"
WAN = "Wan2.1-1.3B, 81 frames 480p, bf16, rank 64"
COGVIDEOX = "CogVideoX-5B, 49 frames 480x720, bf16, rank 32"
WAN_14B = "Wan2.1-14B, 81 frames 480p, bf16, rank 32"
MODELS: dict[str, tuple[Backbone, TrainSettings]] = {
    ANIMATEDIFF: (
        AnimateDiff(model="sd1.5", motion_adapter="animatediff-v1-5-2"),
        TrainSettings(rank=32, mixed_precision="fp16", gradient_accumulation_steps=1),
    ),
    WAN: (
        Wan(model="wan2.1-t2v-1.3b", frames=81, height=480, width=832),
        TrainSettings(rank=64, mixed_precision="bf16", gradient_accumulation_steps=1),
    ),
    COGVIDEOX: (
        CogVideoX(model="cogvideox-5b"),
        TrainSettings(rank=32, mixed_precision="bf16", gradient_accumulation_steps=1),
    ),
    WAN_14B: (
        Wan(model="wan2.1-t2v-14b", frames=81, height=480, width=832),
        TrainSettings(rank=32, mixed_precision="bf16", gradient_accumulation_steps=1),
    ),
}


class Row(BaseModel):
    """One mode of one model."""

    predicted: Literal[True] = True
    model: str
    need: MemoryEstimate
    seconds: float
    """Duration of the prediction."""


def rows(only: str, kept: list[Row]) -> Iterator[Row]:
    """Every mode of every model; rows in `kept` are not predicted again."""
    for model, (backbone, settings) in MODELS.items():
        if only not in model:
            continue
        traces = TraceCache()
        remaining = {row.need.mode: row for row in kept if row.model == model}
        needs: dict[MemoryMode, MemoryEstimate] = {}
        for mode in candidate_modes(list(REFERENCES), Global()):
            began = time.monotonic()
            if mode in remaining:
                needs[mode] = remaining.pop(mode).need
                yield next(row for row in kept if row.model == model and row.need.mode == mode)
                continue
            reference = {mode.reference: REFERENCES[mode.reference]}
            found = estimate_memory(
                backbone, reference, Global(), settings, modes=[mode], traces=traces
            )
            needs[mode] = found.estimates[0]
            yield Row(model=model, need=needs[mode], seconds=round(time.monotonic() - began, 1))
        if remaining:  # rows with the fewest blocks
            yield from remaining.values()
            continue
        began = time.monotonic()
        for need in sorted(
            partial(backbone, settings, needs, traces), key=lambda each: -each.total
        ):
            yield Row(model=model, need=need, seconds=round(time.monotonic() - began, 1))
            began = time.monotonic()


def partial(
    backbone: Backbone,
    settings: TrainSettings,
    needs: dict[MemoryMode, MemoryEstimate],
    traces: TraceCache,
) -> set[MemoryEstimate]:
    """Per card, the fewest checkpointed blocks that fit it, in `joint` and in `linear` mode."""
    found = set()
    for card in tiers().values():
        memory = BUDGET_SHARE * card.memory_gib * GIB
        for backward in ("joint", "linear"):
            mode = MemoryMode(reference="toggle", checkpointing="blocks", backward=backward)
            if needs[mode].total > memory:
                continue
            choice = fewest_blocks(
                backbone, REFERENCES["toggle"], Global(), settings, mode, memory, traces=traces
            )
            if isinstance(choice.estimate.mode.checkpointing, int):
                found.add(choice.estimate)
    return found


def drawn(found: list[Row]) -> str:
    """SVG of each mode's peak against its operations, with the cards' capacities."""
    cards = {card.card.removeprefix("NVIDIA "): card.memory_gib for card in tiers().values()}
    panels = [
        Panel(
            name=model,
            cost="TFLOP per pair (predicted); hollow: quantized weights, which change the numbers",
            spots=[
                Spot(
                    name=row.need.mode.brief(),
                    cost=row.need.flops / 1e12,
                    gib=row.need.total / GIB,
                    hollow=row.need.mode.quantization != "native",
                )
                for row in found
                if row.model == model
            ],
        )
        for model in dict.fromkeys(row.model for row in found)
    ]
    return peaks("Predicted peak of a step against its operations, by memory mode", panels, cards)


def shown(found: list[Row]) -> Table:
    table = Table(title="Predicted peak of one step, GiB")
    for name in ("model", "mode"):
        table.add_column(name)
    for name in ("weights", "activations", "all", "host", "TFLOP", "on a card", "smallest"):
        table.add_column(name, justify="right")
    cards = sorted(tiers().values(), key=lambda card: card.memory_gib)
    for row in found:
        need = row.need
        fits = (card.name for card in cards if need.total <= card.memory_gib * GIB)
        table.add_row(
            row.model.split(",")[0], str(need.mode), f"{need.weights / GIB:.2f}",
            f"{need.activations / GIB:.2f}", f"{need.tensors / GIB:.2f}", f"{need.host / GIB:.1f}",
            f"{need.flops / 1e12:.0f}", f"{need.total / GIB:.1f}", next(fits, "none"),
        )  # fmt: skip
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    parser.add_argument(
        "--keep", action="store_true", help="predict only the rows that --out lacks"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = []
    if options.keep and options.out.exists():
        kept = [Row.model_validate(row) for row in json.loads(options.out.read_text())]
    found = []
    for row in rows(options.only, kept):
        found.append(row)
        size, work = f"{row.need.tensors / GIB:.2f} GiB", f"{row.need.flops / 1e12:.0f} TFLOP"
        print(row.model[:12], row.need.mode, size, work, f"{row.seconds:.0f} s", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([each.model_dump(mode="json") for each in found], indent=1)
        options.out.write_text(text + "\n")
    options.out.with_suffix(".svg").write_text(drawn(found))
    Console(width=140).print(shown(found))
