"""Share of a step before the first adapter, where policy and toggled reference compute the same.

    OMP_NUM_THREADS=1 python -m benchmarks.prefix

That part could be computed once for both. Operations are counted on shapes: of the network up to
the first layer with an adapter, of a complete pass, and of a step with a toggled reference (two
passes without a graph, two with a graph, and their backward passes).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft.tuners.lora import LoraLayer

from dpo_video.backbone.animatediff import AnimateDiff
from dpo_video.backbone.cogvideox import CogVideoX
from dpo_video.backbone.wan import Wan
from dpo_video.estimation.estimate import estimate_memory
from dpo_video.estimation.modes import MemoryMode
from dpo_video.estimation.tracing import DTYPES, empty_pairs, give_tensors
from dpo_video.loss.global_ import Global
from dpo_video.memory.cuda_autocast import cuda_autocast
from dpo_video.memory.peak import peak_bytes
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Backbone
from dpo_video.support.memoryless import Memoryless
from dpo_video.training.lora import adapt
from dpo_video.types import Placement

RESULTS = Path(__file__).parent / "results" / "0.1.0"
MODELS: dict[str, tuple[Backbone, str]] = {
    "SD1.5 + AnimateDiff v1.5.2, 16 frames 512x512": (
        AnimateDiff(model="sd1.5", motion_adapter="animatediff-v1-5-2"),
        "fp16",
    ),
    "CogVideoX-2B, 49 frames 480x720": (CogVideoX(model="cogvideox-2b"), "fp16"),
    "CogVideoX-5B, 49 frames 480x720": (CogVideoX(model="cogvideox-5b"), "bf16"),
    "Wan2.1-1.3B, 81 frames 480x832": (
        Wan(model="wan2.1-t2v-1.3b", frames=81, height=480, width=832),
        "bf16",
    ),
}


class _ReachedAdapterError(Exception):
    """The forward pass arrived at the first adapter."""


def counted(backbone: Backbone, precision: str) -> dict[str, float]:
    """TFLOP of one video: up to the first adapter, of a complete pass, and of a step."""
    settings = TrainSettings(rank=16, mixed_precision=precision)  # type: ignore[arg-type]
    model = backbone.load(Placement(dtype=DTYPES[precision], on_meta=True))
    prompt = model.prompt_shapes()
    assert prompt is not None
    with torch.device("meta"):
        policy = adapt(model, settings, seed=0)
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]

    def stop(*_: Any) -> None:
        raise _ReachedAdapterError

    with Memoryless(), torch.no_grad():
        give_tensors(policy, torch.device("cpu"))
        batch, noise, timestep = empty_pairs(model, prompt, 1, DTYPES[precision])

        def forward() -> None:
            try:
                with cuda_autocast(DTYPES[precision]):
                    model.predict(policy, noise, timestep, batch.context)
            except _ReachedAdapterError:
                pass

        complete = peak_bytes(forward).flops
        hooks = [layer.register_forward_pre_hook(stop) for layer in layers]
        prefix = peak_bytes(forward).flops
        for hook in hooks:
            hook.remove()
    mode = MemoryMode(reference="toggle", checkpointing="none", backward="joint")
    found = estimate_memory(backbone, {"toggle": Toggle()}, Global(), settings, modes=[mode])
    step = found.estimates[0].flops
    return {
        "prefix": prefix / 1e12,
        "pass": complete / 1e12,
        "step": step / 1e12,
        # The reference's prefix, for both videos.
        "saved": 2 * prefix / step,
    }


if __name__ == "__main__":
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {name: counted(*what) for name, what in MODELS.items()}
    for name, figures in found.items():
        print(
            f"{name}: {figures['prefix']:.4f} of {figures['pass']:.1f} TFLOP of a pass; computed "
            f"once, {figures['saved']:.3%} of a step's {figures['step']:.0f} TFLOP are saved"
        )
    (RESULTS / "prefix.json").write_text(json.dumps(found, indent=1) + "\n")
