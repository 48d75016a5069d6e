"""Read a LoRA of any origin: diffusers, PEFT, ComfyUI and other trainers, from a file or the hub.

diffusers' pipelines know the formats. Their converters give the names of a model's own modules, and
the result is written in PEFT's format, as the adapters of this package are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpo_video.diffusion.pretrained import quiet
from dpo_video.errors import UserError
from dpo_video.paths import DIFFUSERS_FILE, is_hub_id
from dpo_video.strategies import VideoModel
from dpo_video.support.atomic import write_tensors
from dpo_video.training.run_dir import checkpoints

_CONFIG = "adapter_config.json"
_FACTORS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora.down": "lora_A", "lora.up": "lora_B"}


def peft_adapter(source: str, model: VideoModel, folder: Path, option: str = "--lora ") -> Path:
    """The folder of a LoRA in PEFT's format; it is converted into `folder` if need be.

    Args:
        source: A file, a folder, a hub id, or HUB_ID/FILE.safetensors.
        model: The model that it is for.
        folder: A new folder.
        option: How the user names a LoRA, for error messages.

    Raises:
        UserError: if there is no LoRA, or it belongs to another model.
    """
    found = _located(source, option)
    if found.is_dir():
        return found
    spec = model.export_spec()
    if spec is None:
        raise UserError(
            "A LoRA of another program needs a backbone that diffusers runs. Name a folder in "
            "PEFT's format, or --backbone animatediff, cogvideox or wan."
        )
    alphas: dict[str, float] = {}
    try:
        with quiet():
            pipeline: Any = getattr(diffusers, spec.pipeline)
            state: Any = pipeline.lora_state_dict(str(found.parent), weight_name=found.name)
        if isinstance(state, tuple):
            state, given = state[0], state[1] if len(state) > 1 else None
            alphas = given or {}
    except (ValueError, KeyError, OSError, SafetensorError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not _is_readable(found):
            raise UserError(
                f"The LoRA '{source}' is damaged ({reason}). Copy or download it again."
            ) from error
        raise UserError(
            f"diffusers' {spec.pipeline} cannot read the LoRA '{source}' ({reason}). Name a LoRA "
            "of this model, or another --backbone."
        ) from error
    first, *others = spec.networks
    updates: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, value in state.items():
        network, _, rest = key.partition(".")
        stem, factor = _split(rest)
        if network not in spec.networks or not factor:
            strange.append(key)
            continue
        module = f"{network}.{stem}" if others else stem
        alpha = alphas.get(f"{key.removesuffix('.weight')}.alpha", alphas.get(f"{network}.{stem}"))
        if factor == "lora_B" and alpha is not None:
            value = value * (float(alpha) / value.shape[1])
        updates.setdefault(module, {})[factor] = value
    _check(source, updates, strange, model, first)
    ranks = {module: int(each["lora_A"].shape[0]) for module, each in updates.items()}
    rank = max(ranks.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(updates),
        rank_pattern={name: each for name, each in ranks.items() if each != rank},
        alpha_pattern={name: each for name, each in ranks.items() if each != rank},
        inference_mode=True,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{module}.{factor}.weight": value.float()
        for module, each in updates.items()
        for factor, value in each.items()
    }
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return folder


def _is_readable(path: Path) -> bool:
    """Whether a .safetensors file has a sound header and all of its bytes."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _split(key: str) -> tuple[str, str]:
    """The module and the factor of a key; no factor if it is of something else."""
    for name, factor in _FACTORS.items():
        if key.endswith(f".{name}.weight"):
            return key.removesuffix(f".{name}.weight"), factor
    return key, ""


def _check(
    source: str,
    updates: dict[str, dict[str, Tensor]],
    strange: list[str],
    model: VideoModel,
    network: str,
) -> None:
    """A UserError unless all updates are of modules of the model."""
    modules = {name for name, _ in model.denoiser.named_modules()}
    strange += [
        module for module, each in updates.items() if len(each) < 2 or module not in modules
    ]
    if strange or not updates:
        first = f" ('{strange[0]}' first)" if strange else ""
        raise UserError(
            f"The LoRA '{source}' has {len(strange)} weights{first} that are no LoRA of this "
            f"model's {network}, so the result would be another one. Name the base model that it "
            "was trained for (--backbone, --set backbone.model=...)."
        )


def _located(source: str, option: str) -> Path:
    """The file of a LoRA, or its folder in PEFT's format."""
    path = Path(source).expanduser()
    if path.is_file():
        return _safe(path, source)
    if not path.exists() and is_hub_id("/".join(source.split("/")[:2])):
        owner, name, *file = source.split("/")
        try:
            path = Path(
                snapshot_download(f"{owner}/{name}", allow_patterns=["*.safetensors", _CONFIG])
            )
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
            raise UserError(
                f"There is no file or folder '{source}', and the hub cannot be reached or has no "
                f"such model. Download it first: hf download {owner}/{name}"
            ) from error
        if file:
            return _safe(path / "/".join(file), source)
    if not path.is_dir():
        raise UserError(
            f"There is no LoRA '{source}'. Name a .safetensors file, a folder, or a hub id."
        )
    if folders := sorted(found.parent.name for found in path.glob(f"*/{_CONFIG}")):
        raise UserError(
            f"'{source}' holds several adapters (in {', '.join(folders)}), and one is needed. Name "
            f"its folder: {option}{source}/{folders[0]}"
        )
    if (path / _CONFIG).is_file():
        return path
    if runs := checkpoints(path):
        adapter = runs[max(runs)] / "adapter"
        raise UserError(f"'{source}' is a run. Name its adapter: {option}{adapter}")
    files = sorted(path.glob("*.safetensors"))
    known = [file for file in files if file.name == DIFFUSERS_FILE] or files
    if len(known) != 1:
        names = ", ".join(file.name for file in files[:5]) or "none"
        raise UserError(
            f"'{source}' holds {len(files)} .safetensors files ({names}). Name one: "
            f"{option}{source}/FILE.safetensors"
        )
    return known[0]


def _safe(path: Path, source: str) -> Path:
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(
            f"'{source}' is no .safetensors file. Other formats can run code when they are read; "
            "convert it to safetensors first."
        )
    return path
