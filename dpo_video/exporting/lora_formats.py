"""LoRA file formats of other programs: write an adapter, and read it back as they do.

diffusers and ComfyUI read a file without alpha as alpha = rank (diffusers,
`utils/peft_utils.py: get_peft_kwargs`; ComfyUI, `comfy/weight_adapter/lora.py: calculate_weight`),
and AnimateDiff-Evolved ignores alpha (`animatediff/model_injection.py:
load_motion_lora_as_patches`). So their files have `alpha / rank` multiplied into the up matrix, and
every reader gets the same update. PEFT's own format keeps alpha.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import diffusers
import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from dpo_video.diffusion.pretrained import quiet
from dpo_video.errors import ExportError
from dpo_video.support.atomic import write_tensors
from dpo_video.training.foreign_lora import DIFFUSERS_FILE
from dpo_video.types import ExportSpec, LoraNames

_METADATA = {"format": "pt"}


@final
@dataclass(frozen=True, kw_only=True)
class LoraUpdate:
    """The update of a linear layer's weight: `scale * up @ down`."""

    down: Float[Tensor, "rank inputs"]
    up: Float[Tensor, "outputs rank"]
    scale: float
    """alpha / rank."""

    @property
    def folded(self) -> Float[Tensor, "outputs rank"]:
        """`scale * up`, in fp32."""
        return self.up.float() * self.scale

    def applied(self, inputs: Float[Tensor, "n inputs"]) -> Float[Tensor, "n outputs"]:
        """The change of the layer's output, in fp32."""
        return inputs @ self.down.float().T @ self.folded.T


LoraDelta = Mapping[str, LoraUpdate]
"""Adapted module of a network to its update."""
Updates = Mapping[str, LoraDelta]
Dtype = torch.dtype | None


def read_delta(network: nn.Module) -> LoraDelta:
    """The updates of a network's adapter, on the CPU."""
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.lora_A.keys()
            found[name] = LoraUpdate(
                down=layer.lora_A[adapter].weight.detach().cpu(),
                up=layer.lora_B[adapter].weight.detach().cpu(),
                scale=float(layer.scaling[adapter]),
            )
    return found


def subfolder(spec: ExportSpec, network: str) -> str:
    """Subfolder of a network's files: its name if there are several networks, else none."""
    return network if len(spec.networks) > 1 else "."


class LoraFormat(ABC):
    """A file format of adapters."""

    @abstractmethod
    def write(self, folder: Path, spec: ExportSpec, updates: Updates, dtype: Dtype) -> None:
        """Write the updates of every adapted network; `dtype` None keeps their precision."""

    @abstractmethod
    def load(self, folder: Path, spec: ExportSpec, name: str) -> None:
        """Load the written adapter of a network into it."""

    def unload(self, network: Any) -> None:
        """Remove the adapter that `load` put on a network; by default as diffusers does."""
        network.unload_lora()

    @final
    @contextmanager
    def loaded(self, folder: Path, spec: ExportSpec, names: Sequence[str]) -> Iterator[None]:
        """Context in which these networks have the written adapter."""
        loaded = []
        try:
            for name in names:
                self.load(folder, spec, name)
                loaded.append(name)
            yield
        finally:
            for name in loaded:
                self.unload(spec.networks[name])


@final
@dataclass(frozen=True)
class DiffusersFormat(LoraFormat):
    """Format of a pipeline's `load_lora_weights(folder)` (diffusers, `loaders/lora_pipeline.py`).

    Keys are `unet.` or `transformer.`, the module's name, and `.lora_A.weight` or `.lora_B.weight`.
    A second network has its own file, whose keys begin with the name of the first network too:
    `load_lora_weights(folder, load_into_transformer_2=True)` selects the second.
    """

    def write(self, folder: Path, spec: ExportSpec, updates: Updates, dtype: Dtype) -> None:
        """Write one file per network."""
        prefix = next(iter(spec.networks))
        for name, layers in updates.items():
            tensors = {}
            for module, update in layers.items():
                down, up = _stored(update, dtype)
                tensors[f"{prefix}.{module}.lora_A.weight"] = down
                tensors[f"{prefix}.{module}.lora_B.weight"] = up
            path = folder / subfolder(spec, name)
            write_tensors(path / DIFFUSERS_FILE, tensors, _METADATA)

    def load(self, folder: Path, spec: ExportSpec, name: str) -> None:
        """Load through the stock pipeline, which has the networks and nothing else."""
        path = str(folder / subfolder(spec, name))
        # Text encoders and image processors are left out on purpose.
        with quiet():
            pipeline = stock_pipeline(spec)
            options = load_options(spec, name)
            # Without weight_name, older versions of diffusers query the hub or fail offline.
            pipeline.load_lora_weights(path, weight_name=DIFFUSERS_FILE, **options)


def load_options(spec: ExportSpec, name: str) -> dict[str, bool]:
    """Arguments of `load_lora_weights` for a network that is not the pipeline's first."""
    first = name == next(iter(spec.networks))
    return {} if first else {f"load_into_{name}": True}


def stock_pipeline(spec: ExportSpec) -> Any:
    """The family's pipeline with the model's own networks and no other parts."""
    pipeline = getattr(diffusers, spec.pipeline)
    parts = inspect.signature(pipeline.__init__).parameters.values()
    required = [part.name for part in parts if part.default is part.empty and part.name != "self"]
    return pipeline(**{**dict.fromkeys(required), **spec.networks})


@final
@dataclass(frozen=True)
class PeftFormat(LoraFormat):
    """Format of `PeftModel.from_pretrained(network, folder)`; adapter_config.json has alpha."""

    config: LoraConfig

    def write(self, folder: Path, spec: ExportSpec, updates: Updates, dtype: Dtype) -> None:
        """Write one folder per network."""
        for name, layers in updates.items():
            path = folder / subfolder(spec, name)
            path.mkdir(exist_ok=True)
            tensors = {}
            for module, update in layers.items():
                for key, factor in (("lora_A", update.down), ("lora_B", update.up)):
                    stored = factor.to(dtype or factor.dtype)
                    tensors[f"base_model.model.{module}.{key}.weight"] = stored
            write_tensors(path / "adapter_model.safetensors", tensors, _METADATA)
            config = copy.deepcopy(self.config)
            config.target_modules = sorted(layers)
            config.base_model_name_or_path, config.revision = (
                spec.file or spec.source, spec.revision,
            )  # fmt: skip
            config.inference_mode = True
            config.save_pretrained(str(path))

    def load(self, folder: Path, spec: ExportSpec, name: str) -> None:
        """Load by PEFT, which changes the network in place; the wrapper is dropped."""
        path = str(folder / subfolder(spec, name))
        PeftModel.from_pretrained(spec.networks[name], path)

    def unload(self, network: Any) -> None:
        """Remove the adapter layer by layer."""
        remove_adapter(network)


@final
@dataclass(frozen=True)
class ComfyFormat(LoraFormat):
    """Format of ComfyUI, with its names of the networks' modules (`ExportSpec.comfy`)."""

    name: str
    """Name of the file; ComfyUI lists files by name."""

    def write(self, folder: Path, spec: ExportSpec, updates: Updates, dtype: Dtype) -> None:
        """Write one file per network."""
        for name, layers in updates.items():
            tensors = {}
            for module, update in layers.items():
                keys = spec.comfy(module)
                if keys is None:
                    raise ExportError(
                        f"ComfyUI has no name for the adapted module '{module}'. Export with "
                        "--format diffusers or merged."
                    )
                tensors[keys.down], tensors[keys.up] = _stored(update, dtype)
            write_tensors(folder / self.file(spec, name), tensors, _METADATA)

    def file(self, spec: ExportSpec, network: str) -> str:
        """The name of a network's file."""
        several = len(spec.networks) > 1
        return f"{self.name}-{network}.safetensors" if several else f"{self.name}.safetensors"

    def load(self, folder: Path, spec: ExportSpec, name: str) -> None:
        """Load as ComfyUI does: look up every layer of the network in the file.

        Follows `comfy/lora.py: model_lora_keys_unet, load_lora`; ComfyUI itself is not run.
        """
        network = spec.networks[name]
        unread = load_file(folder / self.file(spec, name))
        found = {}
        for module, keys in _comfy_names(network, spec):
            if keys.down in unread:
                found[f"{module}.lora_A.weight"] = unread.pop(keys.down)
                found[f"{module}.lora_B.weight"] = unread.pop(keys.up)
        if unread:
            raise ExportError(
                f"ComfyUI has no layer for the key '{next(iter(unread))}': a fault of the "
                "backbone. Export with --format diffusers, and report it."
            )
        network.load_lora_adapter(found, prefix=None)


def _comfy_names(network: Any, spec: ExportSpec) -> Iterator[tuple[str, LoraNames]]:
    for module, layer in network.named_modules():
        keys = spec.comfy(module) if isinstance(layer, nn.Linear) else None
        if keys is not None:
            yield module, keys


def precision(network: nn.Module) -> torch.dtype:
    """The precision that a network was loaded in: its coarsest, since some parts stay in fp32."""
    kinds = {p.dtype for p in network.parameters() if p.is_floating_point()}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)


def remove_adapter(network: Any) -> None:
    """Remove an adapter from a network that peft changed in place."""
    diffusers.utils.recurse_remove_peft_layers(network)
    if hasattr(network, "peft_config"):
        del network.peft_config


def _stored(update: LoraUpdate, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Both factors, with `alpha / rank` multiplied into `up`."""
    return (
        update.down.to(dtype or update.down.dtype),
        update.folded.to(dtype or update.up.dtype),
    )
