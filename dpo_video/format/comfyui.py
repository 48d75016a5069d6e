"""The format of ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from safetensors.torch import load_file
from torch import nn

from dpo_video.errors import ExportError
from dpo_video.extensions import AdapterFormat, ExportedAdapter
from dpo_video.support.atomic import write_tensors
from dpo_video.types import ExportSpec, LoraNames


@final
class ComfyUI(AdapterFormat):
    """Format of ComfyUI, with its names of the networks' modules.

    ComfyUI reads a file without alpha as alpha = rank (`comfy/weight_adapter/lora.py:
    calculate_weight`), and AnimateDiff-Evolved ignores alpha (`animatediff/model_injection.py:
    load_motion_lora_as_patches`), so `alpha / rank` is multiplied into the up matrix.
    """

    def usage(self, spec: ExportSpec) -> str:
        """The folder and the node."""
        text = spec.comfy_usage
        if len(spec.networks) > 1:
            first, second = spec.networks
            text += (
                f" The file ending in `-{first}` is for the high-noise model, the file ending in "
                f"`-{second}` for the low-noise model."
            )
        return text

    def write(self, folder: Path, adapter: ExportedAdapter) -> None:
        """Write one file per network."""
        for name, layers in adapter.updates.items():
            tensors = {}
            for module, update in layers.items():
                keys = adapter.spec.comfy(module)
                if keys is None:
                    raise ExportError(
                        f"ComfyUI has no name for the adapted module '{module}'. Export with "
                        "--format diffusers or merged."
                    )
                tensors[keys.down], tensors[keys.up] = adapter.stored(update)
            write_tensors(folder / _file(adapter, name), tensors, {"format": "pt"})

    def load(self, folder: Path, adapter: ExportedAdapter, network: str) -> None:
        """Load as ComfyUI does: look up every layer of the network in the file.

        Follows `comfy/lora.py: model_lora_keys_unet, load_lora`; ComfyUI itself is not run.
        """
        module_of = adapter.spec.networks[network]
        unread = load_file(folder / _file(adapter, network))
        found = {}
        for module, keys in _comfy_names(module_of, adapter.spec):
            if keys.down in unread:
                found[f"{module}.lora_A.weight"] = unread.pop(keys.down)
                found[f"{module}.lora_B.weight"] = unread.pop(keys.up)
        if unread:
            raise ExportError(
                f"ComfyUI has no layer for the key '{next(iter(unread))}': a fault of the "
                "backbone. Export with --format diffusers, and report it."
            )
        module_of.load_lora_adapter(found, prefix=None)


def _file(adapter: ExportedAdapter, network: str) -> str:
    """The name of a network's file; ComfyUI lists files by name."""
    several = len(adapter.spec.networks) > 1
    return f"{adapter.name}-{network}.safetensors" if several else f"{adapter.name}.safetensors"


def _comfy_names(network: Any, spec: ExportSpec) -> Iterator[tuple[str, LoraNames]]:
    for module, layer in network.named_modules():
        keys = spec.comfy(module) if isinstance(layer, nn.Linear) else None
        if keys is not None:
            yield module, keys
