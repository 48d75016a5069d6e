"""Optimizer steps of any model in any memory mode, with their peak memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dpo_video import registry
from dpo_video.estimation.modes import MemoryMode
from dpo_video.estimation.tracing import DTYPES, empty_pairs, give_tensors
from dpo_video.loss.global_ import Global
from dpo_video.memory.modes import apply_memory_modes
from dpo_video.memory.offload import HostAdamW
from dpo_video.memory.packed_weights import pack_frozen_weights
from dpo_video.memory.peak import Peak, peak_bytes
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Backbone, Loss, Reference, VideoModel
from dpo_video.training.lora import adapt
from dpo_video.training.step import Step
from dpo_video.types import Placement


@dataclass(frozen=True)
class Steps:
    """A model that is ready to be trained on empty pairs."""

    accumulate: Callable[[], None]
    """Forward and backward passes of all pairs of an optimizer step."""
    optimizer: Optimizer
    networks: list[nn.Module]
    device: torch.device

    def optimize(self) -> None:
        """Run an optimizer step to its end."""
        self.accumulate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def count(self) -> Peak:
        """Bytes of tensors and operations of the passes, counted while they run."""
        return peak_bytes(self.accumulate, networks=self.networks, optimizer=self.optimizer)


def on_meta(backbone: Backbone, settings: TrainSettings, device: torch.device) -> VideoModel:
    """The model without weights, which `prepared` fills at random."""
    return backbone.load(Placement(device, DTYPES[settings.mixed_precision], on_meta=True))


def prepared(
    model: VideoModel,
    settings: TrainSettings,
    mode: MemoryMode,
    *,
    loss: Loss | None = None,
    compiled: bool = False,
) -> Steps:
    """Prepare steps in a mode; weights on the meta device get random values.

    Args:
        model: The model, which is changed.
        settings: Rank, precision, batch size and accumulation.
        mode: The memory mode.
        loss: The loss, `global` by default.
        compiled: Also run with memory.compile.
    """
    device, dtype = model.device, DTYPES[settings.mixed_precision]
    prompt = model.prompt_shapes()
    assert prompt is not None
    empty = any(parameter.is_meta for parameter in model.denoiser.parameters())
    with torch.device("meta" if empty else device):
        policy = adapt(model, settings, seed=0)
        reference: Reference = registry.load("reference", mode.reference)()  # type: ignore[assignment]
        reference_model = reference.attach(policy)
    with reference_model.network() as network:
        for each in (policy, network) if empty else ():
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
        loss=loss or Global(),
        mode=mode.backward,
        autocast=lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    )
    kind = HostAdamW if "optimizer" in mode.offload else torch.optim.AdamW
    optimizer = kind(p for p in policy.parameters() if p.requires_grad)
    batch, noise, timestep = empty_pairs(model, prompt, settings.batch_size, dtype)
    noise.normal_()
    count = settings.gradient_accumulation_steps

    def accumulate() -> None:
        for _ in range(count):
            step(batch, noise, timestep, loss_scale=1 / count)

    networks = [policy, *([network] if network is not policy else [])]
    return Steps(accumulate, optimizer, networks, device)


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
    """Peak and time of a model at full size; only `out_of_memory` if the mode does not fit.

    Args:
        backbone: The model family and the size of its videos.
        settings: Rank, precision, batch size and accumulation.
        mode: The memory mode.
        device: Where to run; on a CPU the bytes of tensors are counted in one step.
        loss: The loss.
        compiled: Also run with memory.compile.
        seconds: Steps are repeated for about so long, at least once.
    """
    try:
        model = on_meta(backbone, settings, device)
        steps = prepared(model, settings, mode, loss=loss, compiled=compiled)
        if device.type == "cpu":
            return {"bytes": steps.count().total}
        return _on_gpu(steps, seconds, settings.gradient_accumulation_steps * settings.batch_size)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        free_memory(device)


def _on_gpu(steps: Steps, seconds: float, pairs: int) -> dict[str, Any]:
    def timed() -> float:
        began = time.perf_counter()
        steps.optimize()
        return time.perf_counter() - began

    first = timed()
    settle_peak()
    times = [timed()]
    while sum(times) < seconds and len(times) < 50:
        times.append(timed())
    return {
        "bytes": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "first_step_seconds": first,
        "steps": len(times),
        "seconds_per_pair": median(times) / pairs,
    }


def settle_peak() -> None:
    """Forget the peak of building the model and of the first step, which makes AdamW's state."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def free_memory(device: torch.device) -> None:
    """Free what a finished measurement left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def context(device: torch.device) -> int | None:
    """Bytes of the card that are neither free nor torch's: CUDA's own, if no other process runs."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
