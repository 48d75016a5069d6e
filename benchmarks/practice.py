"""A DPO step as others publish it, written by us from their description, on our models.

`research_script`: diffusers' research project `diffusion_dpo`. Both videos in one batch, one noise
and one timestep for both, the policy first, then the reference without a graph as the same network
with its adapters disabled; errors averaged per video; clip, AdamW, and four figures read back.

`video_dpo`: Video-DPO's standard mode. The reference is a deep copy, made before the adapter; each
video goes through each network in a pass of its own, and both videos' graphs live until the one
backward pass.

Both get latents and prompts that are encoded already, as ours does: the research script encodes
images and prompts in every step, which is not counted against it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from dpo_video.strategies import VideoModel
from dpo_video.types import PairBatch

SLOPE = 2500.0
Step = Callable[[PairBatch, Tensor, Tensor], None]


def research_script(model: VideoModel, policy: PeftModel, optimizer: torch.optim.Optimizer) -> Step:
    parameters = [p for p in policy.parameters() if p.requires_grad]

    def step(batch: PairBatch, noise: Tensor, level: Tensor) -> None:
        clean = torch.cat([batch.first, batch.second])
        noise, level = noise.repeat(2, 1, 1, 1, 1), level.repeat(2)
        context = {name: torch.cat([value, value]) for name, value in batch.context.items()}
        noisy, target = model.add_noise(clean, noise, level), model.target(clean, noise, level)
        predicted = model.predict(policy, noisy, level, context)
        errors = F.mse_loss(predicted.float(), target.float(), reduction="none")
        of_policy = errors.mean(dim=(1, 2, 3, 4)).chunk(2)
        with policy.disable_adapter(), torch.no_grad():
            anchored = model.predict(policy, noisy, level, context).detach()
            errors = F.mse_loss(anchored.float(), target.float(), reduction="none")
            of_reference = errors.mean(dim=(1, 2, 3, 4)).chunk(2)
        inside = (of_reference[0] - of_reference[1]) - (of_policy[0] - of_policy[1])
        loss = -F.logsigmoid(SLOPE * inside).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        means = (torch.cat(of_policy).mean(), torch.cat(of_reference).mean())
        _ = [x.item() for x in (loss.detach(), *means, (inside > 0).float().mean())]

    return step


def video_dpo(model: VideoModel, policy: PeftModel, optimizer: torch.optim.Optimizer) -> Step:
    reference = copy.deepcopy(policy).unload().requires_grad_(False)
    parameters = [p for p in policy.parameters() if p.requires_grad]

    def step(batch: PairBatch, noise: Tensor, level: Tensor) -> None:
        rewards = []
        for clean in (batch.first, batch.second):
            noisy, target = model.add_noise(clean, noise, level), model.target(clean, noise, level)
            with torch.no_grad():
                anchored = model.predict(reference, noisy, level, batch.context)
            predicted = model.predict(policy, noisy, level, batch.context)
            rewards.append(
                F.mse_loss(anchored.float(), target.float()) - F.mse_loss(
                    predicted.float(), target.float()
                )
            )  # fmt: skip
        loss = -F.logsigmoid(SLOPE * (rewards[0] - rewards[1]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _ = loss.item(), (rewards[0] > rewards[1]).float().item()

    return step
