"""Memory of a step in every mode: `dpo-video estimate` compared with measurements.

    python -m benchmarks.estimate_check --tier t4     # on a GPU, capped to that card's memory
    python -m benchmarks.estimate_check --case tiny   # in miniature, on any machine

Networks have their full size and random weights, so nothing is downloaded. On a GPU the peak is
torch's own, over two steps (in the second, gradients and AdamW's state exist), with the process
limited to the memory of --tier by `set_per_process_memory_fraction`; a mode that runs out of memory
is reported. CUDA's own memory is measured too. On a CPU the bytes of tensors are counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.support.plots import Panel, Spot, peaks
from dpo_video import registry
from dpo_video.estimation.estimate import estimate_memory
from dpo_video.estimation.modes import BACKWARDS, CHECKPOINTINGS, MemoryMode
from dpo_video.estimation.results import GIB, Estimate
from dpo_video.estimation.tiers import find_tier, tiers
from dpo_video.estimation.tracing import DTYPES, empty_pairs, give_tensors
from dpo_video.loss.global_ import Global
from dpo_video.memory.modes import apply_memory_modes
from dpo_video.memory.offload import HostAdamW
from dpo_video.memory.packed_weights import pack_frozen_weights
from dpo_video.memory.peak import peak_bytes
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Backbone, Loss, Reference
from dpo_video.training.lora import adapt
from dpo_video.training.step import Step
from dpo_video.types import Placement

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
    parser.add_argument(
        "--tier", choices=tiers(), help="card whose memory limits the process; default: none"
    )
    parser.add_argument("--machine", default="", help="description of the machine in the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if gpu and arguments.tier:
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = find_tier(arguments.tier).memory_gib * GIB / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, fraction))
    cases = arguments.case or (["animatediff", "wan-1.3b"] if gpu else ["tiny"])
    rows = [row for case in cases for row in check(case, device)]
    name = torch.cuda.get_device_name(device) if gpu else platform.machine()
    result = {
        "machine": arguments.machine or name,
        "device": device.type,
        "tier": arguments.tier,
        "torch": torch.__version__,
        "measured": "torch.cuda.max_memory_allocated" if gpu else "bytes of real tensors",
        "context": context(device),
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"estimate_check--{arguments.tier or device.type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    if gpu:
        path.with_suffix(".svg").write_text(drawn(rows, name))
    show(rows)
    print(path)


def drawn(rows: list[dict[str, Any]], gpu: str) -> str:
    """SVG of the measured peaks against the times."""
    panels = [
        Panel(
            name=f"{case}, measured on {gpu}",
            cost="seconds per pair",
            spots=[
                Spot(
                    name=f"{row['reference']} {row['checkpointing']} {row['backward']}",
                    cost=row["seconds_per_pair"],
                    gib=row["bytes"] / GIB,
                )
                for row in rows
                if row["case"] == case and "bytes" in row
            ],
        )
        for case in dict.fromkeys(row["case"] for row in rows if "bytes" in row)
    ]
    cards = {card.card.removeprefix("NVIDIA "): card.memory_gib for card in tiers().values()}
    return peaks("Measured peak of a step against its time, by memory mode", panels, cards)


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


def measured(
    backbone: Backbone,
    settings: TrainSettings,
    mode: MemoryMode,
    device: torch.device,
    *,
    loss: Loss | None = None,
    compiled: bool = False,
    seconds: float = 3.0,
) -> dict[str, Any]:
    """`measure`, then empty the memory; only `out_of_memory` if the mode does not fit."""
    try:
        return measure(
            backbone, settings, mode, device, loss=loss or Global(), compiled=compiled,
            seconds=seconds,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(
    backbone: Backbone,
    settings: TrainSettings,
    mode: MemoryMode,
    device: torch.device,
    *,
    loss: Loss,
    compiled: bool,
    seconds: float,
) -> dict[str, Any]:
    """Optimizer steps on random weights: one to create AdamW's state, then as many as fit.

    Args:
        backbone: The model family and the size of its videos.
        settings: Rank, precision, batch size and accumulation.
        mode: The memory mode.
        device: Where to run; on a CPU the bytes of tensors are counted in one step.
        loss: The loss.
        compiled: Also run with memory.compile.
        seconds: Steps are repeated for about so long, at least once.
    """
    dtype = DTYPES[settings.mixed_precision]
    model = backbone.load(Placement(device, dtype, on_meta=True))
    prompt = model.prompt_shapes()
    assert prompt is not None
    with torch.device("meta"):
        policy = adapt(model, settings, seed=0)
        reference: Reference = registry.load("reference", mode.reference)()  # type: ignore[assignment]
        reference_model = reference.attach(policy)
    with reference_model.network() as network:
        for each in (policy, network):
            give_tensors(each, device)
            for tensor in (*each.parameters(), *each.buffers()):
                if tensor.is_floating_point():
                    tensor.data.normal_(std=0.02)
    on_host = "blocks" in mode.offload
    if on_host or mode.quantization != "native":
        pack_frozen_weights(policy, device, mode.quantization, on_host=on_host)
    update = {"compile": "on" if compiled else "off"}
    apply_memory_modes(policy, mode.memory.model_copy(update=update))
    step = Step(
        model=model,
        policy=policy,
        reference_model=reference_model,
        loss=loss,
        mode=mode.backward,
        autocast=lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    )
    kind = HostAdamW if "optimizer" in mode.offload else torch.optim.AdamW
    optimizer = kind(p for p in policy.parameters() if p.requires_grad)
    batch, noise, timestep = empty_pairs(model, prompt, settings.batch_size, dtype)
    noise.normal_()

    def accumulate() -> None:
        for _ in range(settings.gradient_accumulation_steps):
            step(batch, noise, timestep, loss_scale=1 / settings.gradient_accumulation_steps)

    if device.type == "cpu":
        own = [network] if network is not policy else []
        return {"bytes": peak_bytes(accumulate, networks=[policy, *own], optimizer=optimizer).total}

    def optimize() -> float:
        began = time.perf_counter()
        accumulate()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    first = optimize()
    torch.cuda.empty_cache()  # what building the model left
    torch.cuda.reset_peak_memory_stats()
    times = [optimize()]
    while sum(times) < seconds and len(times) < 50:
        times.append(optimize())
    pairs = settings.gradient_accumulation_steps * settings.batch_size
    return {
        "bytes": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "first_step_seconds": first,
        "steps": len(times),
        "seconds_per_pair": median(times) / pairs,
    }


def context(device: torch.device) -> int | None:
    """Bytes of the card that are neither free nor torch's: CUDA's own, if no other process runs."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


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
