"""DPO steps of other implementations, written from their descriptions, on our models.

`research_script`: diffusers' research project `diffusion_dpo`. Both videos in one batch with the
same noise and timestep; the policy first, then the reference without a graph, as the same network
with its adapters disabled; errors averaged per video; clipping, AdamW, four figures read back.

`video_dpo`: Video-DPO's standard mode. The reference is a deep copy, made before the adapter; each
video passes each network separately, and both graphs exist until the single backward pass.

Both receive encoded latents and prompts, as ours does: the research script encodes images and
prompts in every step, which is not counted. `bench_step.py` times them; this script predicts their
memory at full size, on shapes, beside ours:

    OMP_NUM_THREADS=1 python -m benchmarks.practice
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from dpo_video.strategies import VideoModel
from dpo_video.support.memoryless import Memoryless
from dpo_video.types import PairBatch

SLOPE = 2500.0
GIB = 2**30
RESULTS = Path(__file__).parent / "results" / "0.1.0"

Passes = Callable[[PairBatch, Tensor, Tensor], list[Tensor]]
"""Forward and backward passes of a pair: batch, noise and timestep to the figures read back."""


def research_script(model: VideoModel, policy: PeftModel) -> Passes:
    def passes(batch: PairBatch, noise: Tensor, timestep: Tensor) -> list[Tensor]:
        clean = torch.cat([batch.first, batch.second])
        noise, timestep = noise.repeat(2, 1, 1, 1, 1), timestep.repeat(2)
        context = {name: torch.cat([value, value]) for name, value in batch.context.items()}
        noisy, target = (
            model.add_noise(clean, noise, timestep),
            model.target(clean, noise, timestep),
        )
        predicted = model.predict(policy, noisy, timestep, context)
        errors = F.mse_loss(predicted.float(), target.float(), reduction="none")
        of_policy = errors.mean(dim=(1, 2, 3, 4)).chunk(2)
        with policy.disable_adapter(), torch.no_grad():
            predicted = model.predict(policy, noisy, timestep, context).detach()
            errors = F.mse_loss(predicted.float(), target.float(), reduction="none")
            of_reference = errors.mean(dim=(1, 2, 3, 4)).chunk(2)
        inside = (of_reference[0] - of_reference[1]) - (of_policy[0] - of_policy[1])
        loss = -F.logsigmoid(SLOPE * inside).mean()
        loss.backward()
        means = torch.cat(of_policy).mean(), torch.cat(of_reference).mean()
        return [loss, *means, (inside > 0).float().mean()]

    return passes


def plain(policy: PeftModel) -> PeftModel:
    """Undo `adapt`'s change of the input cast of PEFT's layers."""
    for module in policy.modules():
        vars(module).pop("_cast_input_dtype", None)
    return policy


def frozen_copy(policy: PeftModel) -> nn.Module:
    """The network without its adapter."""
    return copy.deepcopy(policy).unload().requires_grad_(False)


def video_dpo(model: VideoModel, policy: PeftModel, reference: nn.Module) -> Passes:
    def passes(batch: PairBatch, noise: Tensor, timestep: Tensor) -> list[Tensor]:
        rewards = []
        for clean in (batch.first, batch.second):
            noisy, target = (
                model.add_noise(clean, noise, timestep),
                model.target(clean, noise, timestep),
            )
            with torch.no_grad():
                reference_predicted = model.predict(reference, noisy, timestep, batch.context)
            predicted = model.predict(policy, noisy, timestep, batch.context)
            of_reference = F.mse_loss(reference_predicted.float(), target.float())
            rewards.append(of_reference - F.mse_loss(predicted.float(), target.float()))
        loss = -F.logsigmoid(SLOPE * (rewards[0] - rewards[1]))
        loss.backward()
        return [loss, (rewards[0] > rewards[1]).float()]

    return passes


def step(
    passes: Passes, policy: PeftModel, optimizer: torch.optim.Optimizer
) -> Callable[[PairBatch, Tensor, Tensor], None]:
    """An optimizer step of one pair."""
    parameters = [p for p in policy.parameters() if p.requires_grad]

    def run(batch: PairBatch, noise: Tensor, timestep: Tensor) -> None:
        figures = passes(batch, noise, timestep)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _ = [figure.item() for figure in figures]

    return run


# --- at full size, on shapes -------------------------------------------------------------------

CASES = {
    "diffusers' research script": ("script", False),
    "the same, with diffusers' gradient checkpointing": ("script", True),
    "Video-DPO, standard mode": ("seed", False),
    "ours: toggle, joint": ("joint", False),
    "ours: toggle, linear, blocks checkpointed": ("linear", True),
    "ours: toggle, split, blocks checkpointed": ("split", True),
}


def predicted(which: str, checkpointing: bool) -> dict[str, Any]:
    """SD1.5 with AnimateDiff v1.5.2, 16 frames of 512x512, fp16 autocast, LoRA of rank 32."""
    from dpo_video.backbone.animatediff import AnimateDiff
    from dpo_video.estimation.tracing import empty_pairs, give_tensors
    from dpo_video.loss.global_ import Global
    from dpo_video.memory.blocks import checkpoint_blocks
    from dpo_video.memory.cuda_autocast import cuda_autocast
    from dpo_video.memory.peak import peak_bytes
    from dpo_video.reference.toggle import Toggle
    from dpo_video.settings import TrainSettings
    from dpo_video.training.lora import adapt
    from dpo_video.training.step import Step
    from dpo_video.types import Placement

    cpu, half = torch.device("cpu"), torch.float16
    backbone = AnimateDiff(model="sd1.5", motion_adapter="animatediff-v1-5-2")
    model = backbone.load(Placement(cpu, half, on_meta=True))
    prompt = model.prompt_shapes()
    assert prompt is not None
    with torch.device("meta"):
        policy = adapt(model, TrainSettings(rank=32, alpha=32), seed=0)
        networks = [policy, frozen_copy(policy)] if which == "seed" else [policy]
    if which in ("script", "seed"):
        plain(policy)
    if checkpointing and which == "script":
        policy.get_base_model().enable_gradient_checkpointing()
    elif checkpointing:
        checkpoint_blocks(policy)
    with Memoryless():
        for network in networks:
            give_tensors(network, cpu)
        given = empty_pairs(model, prompt, 1, half)
        passes: Callable[..., Any]
        if which == "script":
            passes = research_script(model, policy)
        elif which == "seed":
            passes = video_dpo(model, policy, networks[1])
        else:
            mode: Any = which
            passes = Step(
                model=model, policy=policy, reference_model=Toggle().attach(policy), loss=Global(),
                mode=mode, backward=torch.autograd.backward,
            )  # fmt: skip
        trained = [p for p in policy.parameters() if p.requires_grad]
        with cuda_autocast(half), Memoryless.assumed_true():
            peak = peak_bytes(
                lambda: (passes(*given), None)[1], networks=networks,
                optimizer=torch.optim.AdamW(trained),
            )  # fmt: skip
    parts = ("weights", "gradients", "optimizer", "activations")
    return {"gib": peak.total / GIB, **{part: getattr(peak, part) for part in parts},
            "tflop": peak.flops / 1e12}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted peaks of one step at full size.")
    parser.add_argument("--out", type=Path, default=RESULTS / "practice.json")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    rows = {}
    for name, (which, checkpointing) in CASES.items():
        rows[name] = predicted(which, checkpointing)
        print(f"{name}: {rows[name]['gib']:.1f} GiB, {rows[name]['tflop']:.0f} TFLOP", flush=True)
    setting = " ".join((predicted.__doc__ or "").split())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({"predicted": True, "setting": setting, "rows": rows}, indent=1) + "\n"
    )
    table = ["| step | peak, GiB | TFLOP |", "| --- | ---: | ---: |"]
    table += [f"| {name} | {row['gib']:.1f} | {row['tflop']:.0f} |" for name, row in rows.items()]
    text = f"# Memory of a step at full size, predicted\n\n{setting}\n\n" + "\n".join(table) + "\n"
    out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
