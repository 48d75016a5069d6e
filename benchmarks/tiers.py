"""Memory that every tier's presets need on its card, for each named model configuration.

    OMP_NUM_THREADS=1 python -m benchmarks.tiers

As predicted by `dpo-video estimate --tier T --backbone B --set backbone.model=M`, on shapes and
without a GPU; written to tiers.json and tiers.md, with everything besides the steps: building
pairs, validation videos, an evaluation. Exit code 1 if something does not fit its card.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from dpo_video.estimation.fewest_blocks import BUDGET_SHARE, fewest_blocks
from dpo_video.estimation.results import GIB
from dpo_video.estimation.tiers import Tier, tiers
from dpo_video.estimation.tracing import TraceCache
from dpo_video.workflows.config import resolve
from dpo_video.workflows.estimate import mode_of, phases_of, predict

RESULTS = Path(__file__).parent / "results" / "0.1.0"
MODELS = {
    "cogvideox-2b": "cogvideox",
    "wan2.1-t2v-1.3b": "wan",
    "cogvideox-5b": "cogvideox",
    "wan2.1-t2v-14b": "wan",
    "sd1.5": "animatediff",
}


def row(tier: Tier, model: str, backbone: str) -> dict[str, Any]:
    """The mode that the presets select, and its predicted memory."""
    config = resolve(
        tier=tier.name,
        choices={"backbone": backbone},
        assignments=[f"backbone.model={model}"],
    )
    began, memory = time.monotonic(), tier.memory_gib * GIB
    mode = mode_of(config)
    if config.memory.checkpointing == "auto":
        choice = fewest_blocks(
            config.backbone,
            config.reference,
            config.loss,
            config.train,
            mode,
            BUDGET_SHARE * memory,
        )
        need, blocks = choice.estimate, choice.blocks
    else:
        found = predict(config, alone=True)
        need, blocks = found.estimates[0], found.blocks
    checked = replace(config, memory=need.mode.memory)
    traces = TraceCache()
    found = predict(checked, alone=True, traces=traces)
    checked = replace(
        checked,
        memory=checked.memory.model_copy(update={"text_encoder": config.memory.text_encoder}),
    )
    phases = phases_of(checked, found, traces)
    largest = max(phases, key=lambda phase: phase.total, default=None)
    size = config.backbone.model_dump(include={"frames", "height", "width"})
    return {
        "predicted": True,
        "tier": tier.name,
        "card_gib": tier.memory_gib,
        "model": model,
        **size,
        "rank": config.train.rank,
        "mixed_precision": config.train.mixed_precision,
        "blocks": blocks,
        "mode": need.mode.model_dump(mode="json"),
        "brief": need.mode.brief(),
        "gib": need.total / GIB,
        "host_gib": need.host / GIB,
        "tflop": need.flops / 1e12,
        "phases": {phase.name: phase.total / GIB for phase in phases},
        "largest": "" if largest is None else f"{largest.name} {largest.total / GIB:.1f}",
        "fits": need.total <= memory and all(phase.fits(tier) for phase in phases),
        "seconds": round(time.monotonic() - began, 1),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "| model | tier | rank | mode | blocks | GiB of the card | host GiB | TFLOP per pair "
        "| largest besides the steps, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        lines.append(
            f"| {each['model']}, {each['frames']}x{each['height']}x{each['width']} "
            f"| {each['tier']} | {each['rank']} | {each['brief']} | {each['blocks']} "
            f"| {each['gib']:.1f} of {each['card_gib']:.1f} | {each['host_gib']:.1f} "
            f"| {each['tflop']:,.0f} | {each.get('largest', 'not counted')} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of tiers.json")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in options.model or MODELS:
        for tier in tiers().values():
            rows.append(row(tier, model, MODELS[model]))
            print({key: rows[-1][key] for key in ("model", "tier", "brief", "gib", "seconds")})
            sys.stdout.flush()
            (options.out / "tiers.json").write_text(json.dumps(rows, indent=1) + "\n")
            (options.out / "tiers.md").write_text(markdown(rows))
    sys.exit(0 if all(each["fits"] for each in rows) else 1)
