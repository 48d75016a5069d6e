"""How much a training step holds in each memory mode, predicted on shapes at full size.

    OMP_NUM_THREADS=1 python benchmarks/memory.py

The step is the one that trains, on tensors without memory (dpo_video.peak), so the figures are the
same on any machine. Nothing here was measured on a GPU: its context, its libraries' workspaces and
what its allocator loses to fragments come on top. Half precision is meant twice: `autocast`, as
`train.precision` has it, runs norms in fp32, and their outputs are kept in fp32; `pure` runs all in
half precision, which is not what trains, but what the design's estimate was made with.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from dpo_video.backbone.animatediff import AnimateDiff
from dpo_video.backbone.wan import Wan
from dpo_video.blocks import checkpoint_blocks
from dpo_video.fit import empty_pairs, give_tensors
from dpo_video.loss.global_ import Global
from dpo_video.memory import Step
from dpo_video.peak import as_on_cuda, peak_bytes
from dpo_video.pretrained import outlined
from dpo_video.reference.copy import Copy
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Backbone, Reference
from dpo_video.train import adapt

RESULTS = Path(__file__).parent / "results" / "0.1.0"
GIB, CPU = 2**30, torch.device("cpu")


class Row(BaseModel):
    """One mode of one model. Bytes at the worst moment."""

    predicted: Literal[True] = True
    model: str
    reference: str
    checkpointing: str
    backward: str
    half: str
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    flops: int = 0
    seconds: float = 0
    """That the prediction took."""
    estimate: float | None = None
    """GiB, of the prototype that the design was made with; for the comparison only."""

    @property
    def gib(self) -> float:
        """All four."""
        return (self.weights + self.gradients + self.optimizer + self.activations) / GIB


ANIMATEDIFF, WAN = (
    "SD1.5 + AnimateDiff v1.5.2, 4x16x64x64, fp16, rank 32",
    ("Wan2.1-1.3B, 81 frames 480p, bf16, rank 64"),
)
MODELS: dict[str, tuple[Backbone, torch.dtype, int]] = {
    ANIMATEDIFF: (
        AnimateDiff(model="sd1.5", motion_adapter="animatediff-v1-5-2"), torch.float16, 32,
    ),
    WAN: (
        Wan(model="wan2.1-t2v-1.3b", frames=81, height=480, width=832), torch.bfloat16, 64,
    ),
}  # fmt: skip
REFERENCES: dict[str, Reference] = {"toggle": Toggle(), "copy": Copy()}
MODES: list[tuple[str, str, str, str, float | None]] = [
    (ANIMATEDIFF, "copy", "none", "joint", 46.2),
    (ANIMATEDIFF, "toggle", "none", "joint", 43.8),
    (ANIMATEDIFF, "toggle", "none", "split", None),
    (ANIMATEDIFF, "toggle", "diffusers", "joint", 26.6),
    (ANIMATEDIFF, "toggle", "diffusers", "split", 15.2),
    (ANIMATEDIFF, "toggle", "blocks", "joint", None),
    (ANIMATEDIFF, "toggle", "blocks", "split", 6.7),
    (ANIMATEDIFF, "toggle", "blocks", "linear", None),
    (WAN, "toggle", "none", "joint", 153.0),
    (WAN, "toggle", "blocks", "joint", 12.3),
    (WAN, "toggle", "blocks", "split", 9.4),
    (WAN, "toggle", "blocks", "linear", None),
]


def rows(only: str) -> Iterator[Row]:
    for model, reference, checkpointing, backward, estimate in MODES:
        for half in ("autocast", "pure"):
            row = Row(
                model=model, reference=reference, checkpointing=checkpointing, backward=backward,
                half=half, estimate=estimate,
            )  # fmt: skip
            if only in model:
                yield predicted(row)


def predicted(row: Row) -> Row:
    began = time.monotonic()
    backbone, dtype, rank = MODELS[row.model]
    with outlined():
        model = backbone.load(CPU, dtype)
        prompt = model.prompt_shapes()
    assert prompt is not None
    with torch.device("meta"):
        policy = adapt(model, TrainSettings(rank=rank, alpha=rank), seed=0)
        anchor = REFERENCES[row.reference].follow(policy)
    if row.half == "pure":
        policy.to(dtype)
    if row.checkpointing == "diffusers":
        policy.get_base_model().enable_gradient_checkpointing()
    elif row.checkpointing == "blocks":
        checkpoint_blocks(policy)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    mode: Any = row.backward
    with FakeTensorMode(allow_non_fake_inputs=True):
        give_tensors(policy, CPU)
        with anchor.network() as network:
            give_tensors(network, CPU)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        batch, noise, level = empty_pairs(model, prompt, 1, dtype)
        step = Step(
            model=_Halved(model, dtype) if row.half == "pure" else model,  # type: ignore[arg-type]
            policy=policy, anchor=anchor, loss=Global(), mode=mode,
            backward=torch.autograd.backward,
        )  # fmt: skip
        with as_on_cuda(dtype) if row.half == "autocast" else nullcontext(), _Believing():
            peak = peak_bytes(
                lambda: (step(batch, noise, level), None)[1],
                networks=[policy, network],
                optimizer=torch.optim.AdamW(parameters),
            )
    return row.model_copy(
        update={
            "weights": peak.weights, "gradients": peak.gradients, "optimizer": peak.optimizer,
            "activations": peak.activations, "flops": peak.flops,
            "seconds": round(time.monotonic() - began, 1),
        }
    )  # fmt: skip


class _Halved:
    """A model whose denoiser is given half precision."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

    def predict(self, denoiser: Any, noisy: Any, level: Any, context: Any) -> Any:
        return self.model.predict(denoiser, noisy.to(self.dtype), level, context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class _Believing(TorchFunctionMode):
    """Lets comparisons of values pass, where there are none."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return True if func is torch.equal else func(*args, **(kwargs or {}))


def shown(found: list[Row]) -> Table:
    table = Table(title="Predicted peaks of one step, GiB")
    for name in ("model", "reference", "checkpointing", "backward", "half", "weights",
                 "activations", "all", "estimate", "TFLOP"):  # fmt: skip
        table.add_column(name, justify="left" if name in Row.model_fields else "right")
    for row in found:
        table.add_row(
            row.model.split(",")[0], row.reference, row.checkpointing, row.backward, row.half,
            f"{row.weights / GIB:.2f}", f"{row.activations / GIB:.2f}", f"{row.gib:.1f}",
            "" if row.estimate is None else f"{row.estimate:.1f}", f"{row.flops / 1e12:.0f}",
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
        size, work = f"{row.gib:.1f} GiB", f"{row.flops / 1e12:.0f} TFLOP"
        mode = (row.model[:12], row.reference, row.checkpointing, row.backward, row.half)
        print(*mode, size, work, f"{row.seconds:.0f} s", flush=True)
    Console(width=130).print(shown(found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps([row.model_dump() for row in found], indent=1) + "\n")
