"""Put a trained adapter on a model for sampling, so that it computes what the policy computed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dpo_video.errors import RunError
from dpo_video.memory.packed_weights import frozen_weights
from dpo_video.strategies import VideoModel
from dpo_video.training.checkpoint import load_adapter


def put_on(model: VideoModel, adapter: Path, *, merge: bool = True) -> nn.Module:
    """Put an adapter on the model's denoiser, in place, and return the adapted network.

    It is merged into weights in fp32. An update of DPO is often smaller than the rounding error of
    weights in half precision, where merging would lose it: there, and on packed weights, the
    adapter stays separate, in fp32, as in training.

    Args:
        model: The base model.
        adapter: A folder in PEFT's format.
        merge: False keeps the adapter separate in fp32 too: a PeftModel, whose `unload` takes the
            adapter off.

    Raises:
        RunError: if the adapter does not fit the denoiser, is not finite or cannot be merged.
    """
    half = any(
        each.dtype in (torch.float16, torch.bfloat16) for each in model.denoiser.parameters()
    )
    instead = "Evaluate the run with the backbone that it was trained on."
    policy = load_adapter(model.denoiser, adapter, instead)
    for name, parameter in policy.named_parameters():
        if ".lora_" in name and not parameter.isfinite().all():
            raise RunError(
                f"The adapter in '{adapter}' is not finite ('{name}'): its training has diverged. "
                "Use an earlier checkpoint (--checkpoint N)."
            )
    if half or not merge or next(frozen_weights(policy), None) is not None:
        return policy.eval().requires_grad_(False)
    try:
        network: nn.Module = policy.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:  # not finite, or of an unsupported kind
        raise RunError(
            f"The adapter in '{adapter}' cannot be merged into the model ({error}). Use an earlier "
            "checkpoint (--checkpoint N), or half precision (--set train.mixed_precision=bf16), in "
            "which it stays separate."
        ) from error
    return network.eval().requires_grad_(False)
