"""An adapter in the layouts of files that other programs read, and read back as they read them.

diffusers and ComfyUI take a file without alpha to mean alpha = rank (diffusers,
`utils/peft_utils.py: get_peft_kwargs`; ComfyUI, `comfy/weight_adapter/lora.py: calculate_weight`),
and AnimateDiff-Evolved knows no alpha at all (`animatediff/model_injection.py:
load_motion_lora_as_patches`). So in their files `alpha / rank` is multiplied into the up matrix,
and every reader, old or new, sees the same update. PEFT's own format keeps alpha.
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
import transformers
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from dpo_video.errors import ExportError
from dpo_video.support.atomic import write_tensors
from dpo_video.types import ExportSpec, LoraNames

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # what load_lora_weights looks for
_METADATA = {"format": "pt"}


@final
@dataclass(frozen=True, kw_only=True)
class Update:
    """What an adapter adds to the weight of a linear layer: `scale * up @ down`."""

    down: Float[Tensor, "rank inputs"]
    up: Float[Tensor, "outputs rank"]
    scale: float
    """alpha / rank."""

    @property
    def folded(self) -> Float[Tensor, "outputs rank"]:
        """`up` with the scale in it."""
        return self.up.float() * self.scale

    def applied(self, inputs: Float[Tensor, "n inputs"]) -> Float[Tensor, "n outputs"]:
        """What the layer's output gains, in fp32."""
        return inputs @ self.down.float().T @ self.folded.T


# Of a network: its adapted modules' names, and their updates.
LoraDelta = Mapping[str, Update]


def read_delta(network: nn.Module) -> LoraDelta:
    """The updates that are on a network now, on the CPU."""
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.lora_A.keys()
            found[name] = Update(
                down=layer.lora_A[adapter].weight.detach().cpu(),
                up=layer.lora_B[adapter].weight.detach().cpu(),
                scale=float(layer.scaling[adapter]),
            )
    return found


def subfolder(publication: ExportSpec, network: str) -> str:
    """Where a network's files go: into a folder of its name if there are several networks."""
    return network if len(publication.networks) > 1 else "."


class LoraFormat(ABC):
    """A format of adapters."""

    @abstractmethod
    def write(
        self,
        folder: Path,
        publication: ExportSpec,
        updates: Mapping[str, LoraDelta],
        dtype: torch.dtype | None,
    ) -> None:
        """Write the updates of every adapted network; in their own precision if `dtype` is None."""

    @abstractmethod
    def load(self, folder: Path, publication: ExportSpec, name: str) -> None:
        """Put what was written for a network on it."""

    @abstractmethod
    def unload(self, network: Any) -> None:
        """Take it off again."""

    @final
    @contextmanager
    def loaded(self, folder: Path, publication: ExportSpec, names: Sequence[str]) -> Iterator[None]:
        """With what was written on the networks of these names."""
        put_on = []
        try:
            for name in names:
                self.load(folder, publication, name)
                put_on.append(name)
            yield
        finally:
            for name in put_on:
                self.unload(publication.networks[name])


@final
@dataclass(frozen=True)
class Diffusers(LoraFormat):
    """What a pipeline's `load_lora_weights(folder)` reads (diffusers, `loaders/lora_pipeline.py`).

    Keys are `unet.` or `transformer.`, the module's name, and `.lora_A.weight` or `.lora_B.weight`.
    A second network's file is one of its own, whose keys begin with the first one's name all the
    same: `load_lora_weights(folder, load_into_transformer_2=True)` says which it is.
    """

    def write(
        self,
        folder: Path,
        publication: ExportSpec,
        updates: Mapping[str, LoraDelta],
        dtype: torch.dtype | None,
    ) -> None:
        """One file a network."""
        prefix = next(iter(publication.networks))
        for name, layers in updates.items():
            tensors = {}
            for module, update in layers.items():
                down, up = _stored(update, dtype)
                tensors[f"{prefix}.{module}.lora_A.weight"] = down
                tensors[f"{prefix}.{module}.lora_B.weight"] = up
            place = folder / subfolder(publication, name)
            write_tensors(place / DIFFUSERS_FILE, tensors, _METADATA)

    def load(self, folder: Path, publication: ExportSpec, name: str) -> None:
        """Through the stock pipeline, which gets nothing but the networks."""
        place = str(folder / subfolder(publication, name))
        with _quiet():
            pipeline = stock_pipeline(publication)
            options = load_options(publication, name)
            # Without the name, an older diffusers asks the hub, or refuses where it is offline.
            pipeline.load_lora_weights(place, weight_name=DIFFUSERS_FILE, **options)

    def unload(self, network: Any) -> None:
        """As the pipeline does it."""
        network.unload_lora()


def load_options(publication: ExportSpec, name: str) -> dict[str, bool]:
    """What `load_lora_weights` must be told for a network that is not the pipeline's first."""
    first = name == next(iter(publication.networks))
    return {} if first else {f"load_into_{name}": True}


def stock_pipeline(publication: ExportSpec) -> Any:
    """The family's pipeline with the model's own networks, and without anything else."""
    pipeline = getattr(diffusers, publication.pipeline)
    parts = inspect.signature(pipeline.__init__).parameters.values()
    required = [part.name for part in parts if part.default is part.empty and part.name != "self"]
    return pipeline(**{**dict.fromkeys(required), **publication.networks})


@final
@dataclass(frozen=True)
class Peft(LoraFormat):
    """What `PeftModel.from_pretrained(network, folder)` reads; alpha is in adapter_config.json."""

    config: LoraConfig

    def write(
        self,
        folder: Path,
        publication: ExportSpec,
        updates: Mapping[str, LoraDelta],
        dtype: torch.dtype | None,
    ) -> None:
        """A folder a network."""
        for name, layers in updates.items():
            place = folder / subfolder(publication, name)
            place.mkdir(exist_ok=True)
            tensors = {}
            for module, update in layers.items():
                for key, factor in (("lora_A", update.down), ("lora_B", update.up)):
                    stored = factor.to(dtype or factor.dtype)
                    tensors[f"base_model.model.{module}.{key}.weight"] = stored
            write_tensors(place / "adapter_model.safetensors", tensors, _METADATA)
            config = copy.deepcopy(self.config)
            config.target_modules = set(layers)
            config.base_model_name_or_path, config.revision = (
                publication.source, publication.revision,
            )  # fmt: skip
            config.inference_mode = True
            config.save_pretrained(str(place))

    def load(self, folder: Path, publication: ExportSpec, name: str) -> None:
        """PEFT puts it into the network itself; its wrapper is not needed to run it."""
        place = str(folder / subfolder(publication, name))
        PeftModel.from_pretrained(publication.networks[name], place)

    def unload(self, network: Any) -> None:
        """Layer by layer: the wrapper that could do it is gone."""
        remove_adapter(network)


@final
@dataclass(frozen=True)
class Comfy(LoraFormat):
    """What ComfyUI reads, by its names for the networks' modules (`Publication.comfy`)."""

    name: str
    """What the file is called; ComfyUI lists files by name."""

    def write(
        self,
        folder: Path,
        publication: ExportSpec,
        updates: Mapping[str, LoraDelta],
        dtype: torch.dtype | None,
    ) -> None:
        """One file a network."""
        for name, layers in updates.items():
            tensors = {}
            for module, update in layers.items():
                keys = publication.comfy(module)
                if keys is None:
                    raise ExportError(
                        f"ComfyUI has no name for '{module}', which this run adapted. Export it "
                        "with --format diffusers or merged."
                    )
                tensors[keys.down], tensors[keys.up] = _stored(update, dtype)
            write_tensors(folder / self.file(publication, name), tensors, _METADATA)

    def file(self, publication: ExportSpec, network: str) -> str:
        """The name of a network's file."""
        several = len(publication.networks) > 1
        return f"{self.name}-{network}.safetensors" if several else f"{self.name}.safetensors"

    def load(self, folder: Path, publication: ExportSpec, name: str) -> None:
        """As ComfyUI goes about it: it asks the file for every layer that the network has.

        `comfy/lora.py: model_lora_keys_unet, load_lora`. ComfyUI itself is not asked.
        """
        network = publication.networks[name]
        left = load_file(folder / self.file(publication, name))
        found = {}
        for module, keys in _comfy_names(network, publication):
            if keys.down in left:
                found[f"{module}.lora_A.weight"] = left.pop(keys.down)
                found[f"{module}.lora_B.weight"] = left.pop(keys.up)
        if left:
            raise ExportError(
                f"ComfyUI would not know what to do with '{next(iter(left))}'. This is a fault of "
                "the backbone's names for it; export with --format diffusers, and report it."
            )
        network.load_lora_adapter(found, prefix=None)

    def unload(self, network: Any) -> None:
        """As it was put on."""
        network.unload_lora()


def _comfy_names(network: Any, publication: ExportSpec) -> Iterator[tuple[str, LoraNames]]:
    for module, layer in network.named_modules():
        keys = publication.comfy(module) if isinstance(layer, nn.Linear) else None
        if keys is not None:
            yield module, keys


def precision(network: nn.Module) -> torch.dtype:
    """What a network was loaded in: the coarsest of its parameters, as some are kept in fp32."""
    kinds = {p.dtype for p in network.parameters() if p.is_floating_point()}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)


def remove_adapter(network: Any) -> None:
    """Take an adapter off a network that peft put it into."""
    diffusers.utils.recurse_remove_peft_layers(network)
    if hasattr(network, "peft_config"):
        del network.peft_config


def _stored(update: Update, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Both factors with alpha folded in."""
    return (
        update.down.to(dtype or update.down.dtype),
        update.folded.to(dtype or update.up.dtype),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of what is missing here on purpose: text encoders, image processors."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
