"""Memory of a step in every mode: `dpo-video estimate` compared with measurements.

    python -m benchmarks.estimate_check               # on a GPU: AnimateDiff and Wan at full size
    python -m benchmarks.estimate_check --case tiny   # in miniature, on any machine

Networks have random weights, so nothing is downloaded. On a GPU the peak is torch's own, over two
steps (in the second, gradients and AdamW's state exist); a mode that runs out of memory is
reported. CUDA's own memory is measured too. On a CPU the bytes of tensors are counted. A tier's
memory and presets are measured by `bench_memory.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.support.steps import context, measured
from dpo_video import registry
from dpo_video.estimation.estimate import estimate_memory
from dpo_video.estimation.modes import BACKWARDS, CHECKPOINTINGS, MemoryMode
from dpo_video.estimation.results import GIB, Estimate
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Backbone, Loss, Reference

RESULTS = Path(__file__).parent / "results" / "0.1.0"
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: backbone, its options, training options
    "tiny": ("tiny", {}, {"rank": 16, "mixed_precision": "no"}),
    "animatediff": ("animatediff", {}, {"rank": 32, "mixed_precision": "fp16"}),
    "wan-1.3b": ("wan", {"model": "wan2.1-t2v-1.3b"}, {"rank": 64, "mixed_precision": "bf16"}),
}
REFERENCES = ("toggle", "copy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--case", choices=CASES, action="append", help="default: those for this machine"
    )
    parser.add_argument("--machine", default="", help="description of the machine in the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    cases = arguments.case or (["animatediff", "wan-1.3b"] if gpu else ["tiny"])
    rows = [row for case in cases for row in check(case, device)]
    name = torch.cuda.get_device_name(device) if gpu else platform.machine()
    result = {
        "machine": arguments.machine or name,
        "device": device.type,
        "torch": torch.__version__,
        "measured": "torch.cuda.max_memory_allocated" if gpu else "bytes of real tensors",
        "context": context(device),
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"estimate_check--{device.type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    show(rows)
    print(path)


def check(case: str, device: torch.device) -> list[dict[str, Any]]:
    kind, options, training = CASES[case]
    backbone: Backbone = registry.load("backbone", kind)(**options)  # type: ignore[assignment]
    loss: Loss = registry.load("loss", "global")()  # type: ignore[assignment]
    settings = TrainSettings(batch_size=1, gradient_accumulation_steps=2, **training)
    references: dict[str, Reference] = {
        name: registry.load("reference", name)()  # type: ignore[misc]
        for name in REFERENCES
    }
    predicted = estimate_memory(backbone, references, loss, settings)
    return [
        {
            "case": case,
            **compare(predicted, need.mode, backbone, loss, settings, device),
        }
        for need in predicted.estimates
        if need.mode.checkpointing in CHECKPOINTINGS and need.mode.backward in BACKWARDS
    ]


def compare(
    predicted: Estimate,
    mode: MemoryMode,
    backbone: Backbone,
    loss: Loss,
    settings: TrainSettings,
    device: torch.device,
) -> dict[str, Any]:
    need = predicted.for_mode(mode)
    assert need is not None
    found = measured(backbone, settings, mode, device, loss=loss)
    peak = found.get("bytes")
    return {
        **mode.model_dump(),
        "predicted": need.tensors,
        "predicted_card": need.total,
        **found,
        "error": None if peak is None else need.tensors / peak - 1,
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    for column in (
        "case",
        "reference",
        "checkpointing",
        "backward",
        "predicted",
        "measured",
        "error",
    ):
        table.add_column(column)
    for row in rows:
        peak = row.get("bytes")
        table.add_row(
            *(row[key] for key in ("case", "reference", "checkpointing", "backward")),
            f"{row['predicted'] / GIB:.3f} GiB",
            "out of memory" if peak is None else f"{peak / GIB:.3f} GiB",
            "" if peak is None else f"{row['error']:+.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
