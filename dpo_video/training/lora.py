"""LoRA adapters: a new one, or one to start from."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dpo_video.errors import TrainingError, UserError, unknown
from dpo_video.memory.compile import keep_start
from dpo_video.memory.peft_autocast import skip_adapter_input_cast
from dpo_video.settings import LARGEST_RANK, MemorySettings, TrainSettings
from dpo_video.strategies import VideoModel
from dpo_video.support.rng import derive
from dpo_video.training.adapter_config import read_lora_config
from dpo_video.training.checkpoint import load_adapter
from dpo_video.training.foreign_lora import peft_adapter

_OPTION = "--set train.init_from="
_POSSIBLE = frozenset({
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights",
})  # fmt: skip
_ELSEWHERE = {"r": "train.rank", "lora_alpha": "train.alpha", "inference_mode": "nothing"}
_BASE = "it trains weights of the base model, which is the reference"
_IMPOSSIBLE: Mapping[str, str] = {
    "lora_dropout": "dropout makes the policy differ from its reference before the first step",
    "bias": _BASE,
    "modules_to_save": _BASE,
    "trainable_token_indices": _BASE,
    "layer_replication": "it changes the layers of the base model, which is the reference",
    "lora_bias": "a layer without a bias could not be merged with it",
}
_STARTS = (True, "gaussian")  # of init_lora_weights: those that leave the base model as it is


def adapt(model: VideoModel, settings: TrainSettings, seed: int) -> PeftModel:
    """Add a LoRA to the model's denoiser, the only trainable part.

    `B` of a new one starts at zero, so the policy starts as the reference. There is no dropout,
    which would make the two differ at step 0. With `train.init_from`, policy and reference start
    as the base model with that LoRA; on the meta device, it is left out.

    Raises:
        UserError: if the options of the LoRA contradict each other or the denoiser.
        RunError: if the LoRA to start from does not fit.
        TrainingError: if other weights are trainable, or the denoiser has an adapter already.
    """
    if any(isinstance(part, BaseTunerLayer) for part in model.denoiser.modules()):
        raise TrainingError(
            "The denoiser has an adapter already, and the reference would lack it. The backbone "
            "must merge it into the weights, or leave it to train.init_from."
        )
    torch.manual_seed(derive(seed, "lora"))
    on_meta = any(parameter.is_meta for parameter in model.denoiser.parameters())
    if settings.init_from is not None and not on_meta:
        policy = _started_from(settings.init_from, model)
    else:
        policy = _new(model, settings)
    stray = [n for n, p in policy.named_parameters() if p.requires_grad and ".lora_" not in n]
    if stray:
        raise TrainingError(
            f"{len(stray)} weights outside the adapter are trainable, such as '{stray[0]}'. The "
            "backbone must load its model frozen."
        )
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    if settings.init_from is not None and not on_meta:
        keep_start(policy)
    skip_adapter_input_cast(policy)
    return policy


def check_lora(settings: TrainSettings, memory: MemorySettings) -> None:
    """Check the options of the LoRA before anything is loaded.

    Raises:
        UserError: if they contradict each other, the reference or the memory modes.
    """
    if settings.lora and settings.init_from is not None:
        raise UserError(
            "train.lora describes a new adapter, and train.init_from names one that exists. Leave "
            "one of them out."
        )
    config = _config(settings, ["layers"])
    if not config.use_dora:
        return
    modes = {
        f"memory.quantization={memory.quantization}": memory.quantization != "native",
        "memory.offload=blocks": "blocks" in memory.offload,
        f"memory.shard={memory.shard}": memory.shard > 1,
        "memory.compile=on": memory.compile == "on",
        f"train.mixed_precision={settings.mixed_precision}": settings.mixed_precision != "no",
    }
    for mode, used in modes.items():
        if used:
            raise UserError(
                "train.lora.use_dora divides by the norm of whole weights. With "
                f"{mode} these are not at hand or are rounded, and policy and reference would "
                "differ before the first step. Leave one of them out."
            )


def starting_rank(settings: TrainSettings, model: VideoModel) -> TrainSettings:
    """The settings with rank and alpha of the LoRA that `train.init_from` names, if it does.

    Raises:
        UserError: if there is no such LoRA, or it belongs to another model.
    """
    if settings.init_from is None:
        return settings
    with tempfile.TemporaryDirectory(prefix="dpo-video-") as scratch:
        folder = peft_adapter(settings.init_from, model, Path(scratch) / "adapter", _OPTION)
        try:
            config = read_lora_config(folder / "adapter_config.json")
        except (OSError, ValueError) as error:
            raise UserError(
                f"train.init_from: the LoRA '{settings.init_from}' cannot be read ({error}). Name "
                "another one."
            ) from error
    return settings.model_copy(update={"rank": config.r, "alpha": float(config.lora_alpha)})


def _started_from(source: str, model: VideoModel) -> PeftModel:
    instead = "Name a LoRA of this model (--set train.init_from=...)."
    with tempfile.TemporaryDirectory(prefix="dpo-video-") as scratch:
        folder = peft_adapter(source, model, Path(scratch) / "adapter", _OPTION)
        policy = load_adapter(model.denoiser, folder, instead, trainable=True)
    _linear_layers(policy, f"The LoRA '{source}' adapts")
    for name, parameter in policy.named_parameters():
        if ".lora_" in name and not parameter.isfinite().all():
            raise UserError(
                f"The LoRA '{source}' is not finite ('{name}'). Name another one to start from "
                f"({_OPTION}...)."
            )
    return policy


def _new(model: VideoModel, settings: TrainSettings) -> PeftModel:
    config = _config(settings, model.lora_targets())
    try:
        policy: PeftModel = get_peft_model(model.denoiser, config)
    except ValueError as error:
        if not settings.lora:
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"train.lora does not fit this model ({reason}). Change it.") from error
    if isinstance(config.target_modules, set):  # PEFT would write it in hash order
        config.target_modules = sorted(config.target_modules)
    if settings.lora:
        _resolve(config, policy)
    return policy


def _resolve(config: LoraConfig, policy: PeftModel) -> None:
    """Write into a configuration which layers have which rank and alpha, without patterns."""
    layers = _linear_layers(policy, "train.lora.target_modules names")
    (adapter,) = policy.peft_config
    ranks = {name: layer.r[adapter] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[adapter] for name, layer in layers.items()}
    config.target_modules = sorted(layers)
    config.rank_pattern = {name: each for name, each in ranks.items() if each != config.r}
    config.alpha_pattern = {
        name: each for name, each in alphas.items() if each != config.lora_alpha
    }
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _linear_layers(policy: PeftModel, what: str) -> dict[str, LoraLayer]:
    """The adapted layers by name.

    Raises:
        UserError: if one is not linear; `what` is its subject and verb.
    """
    base: nn.Module = policy.get_base_model()
    layers = {name: part for name, part in base.named_modules() if isinstance(part, LoraLayer)}
    for name, layer in layers.items():
        if not hasattr(layer.get_base_layer(), "in_features"):
            raise UserError(
                f"{what} '{name}', which is no linear layer; adapters of other layers cannot be "
                "exported. Choose another one."
            )
    return layers


def _config(settings: TrainSettings, targets: list[str]) -> LoraConfig:
    """Peft's configuration of a new adapter.

    Raises:
        UserError: for an option that peft does not have or refuses, or that is not possible here.
    """
    given = settings.lora
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for name, value in given.items():
        path = f"train.lora.{name}"
        if name not in known:
            raise unknown("option", path, [f"train.lora.{each}" for each in _POSSIBLE])
        if name in _ELSEWHERE:
            raise UserError(f"{path} is set by {_ELSEWHERE[name]}. Leave it out.")
        if name not in _POSSIBLE:
            reason = _IMPOSSIBLE.get(name, "the adapter could not be read back and exported")
            raise UserError(f"{path} is not possible here: {reason}. Leave it out.")
        if reason := _wrong(name, value):
            raise UserError(f"{path} = {value!r} {reason}. See peft's LoraConfig.")
    options: dict[str, Any] = {"target_modules": targets, **given}
    try:
        return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"train.lora: peft refuses it ({error}). See its LoraConfig.") from error


def _wrong(name: str, value: Any) -> str:
    """What is wrong with an option that peft takes without a check; "" if nothing."""
    if name in ("use_rslora", "use_dora") and not isinstance(value, bool):
        return "is neither true nor false"
    if name == "init_lora_weights" and value not in _STARTS:
        return "is not true or gaussian: others change the base model, which is the reference"
    if name == "rank_pattern" and not _numbers(value, int, LARGEST_RANK):
        return "is no table of names of modules and ranks"
    if name == "alpha_pattern" and not _numbers(value, (int, float), float("inf")):
        return "is no table of names of modules and numbers"
    return ""


def _numbers(table: Any, kind: Any, most: float) -> bool:
    return isinstance(table, dict) and all(
        isinstance(each, kind) and not isinstance(each, bool) and 0 < each <= most
        for each in table.values()
    )
