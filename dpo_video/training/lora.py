"""LoRA adapters."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dpo_video.errors import TrainingError
from dpo_video.memory.peft_autocast import skip_adapter_input_cast
from dpo_video.settings import TrainSettings
from dpo_video.strategies import VideoModel
from dpo_video.support.rng import derive


def adapt(model: VideoModel, settings: TrainSettings, seed: int) -> PeftModel:
    """Add a LoRA to the model's denoiser, the only trainable part.

    `B` starts at zero, so the policy starts as the reference. There is no dropout, which would make
    the two differ at step 0.

    Raises:
        TrainingError: if other weights are trainable.
    """
    torch.manual_seed(derive(seed, "lora"))
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=model.lora_targets(),
    )
    policy: PeftModel = get_peft_model(model.denoiser, config)
    if isinstance(config.target_modules, set):  # PEFT would write it in hash order
        config.target_modules = sorted(config.target_modules)
    stray = [n for n, p in policy.named_parameters() if p.requires_grad and ".lora_" not in n]
    if stray:
        raise TrainingError(
            f"{len(stray)} weights outside the adapter are trainable, such as '{stray[0]}'. The "
            "backbone must load its model frozen."
        )
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    skip_adapter_input_cast(policy)
    return policy
