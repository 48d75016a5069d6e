"""The format of diffusers' pipelines."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, final

import diffusers

from dpo_video.diffusion.pretrained import quiet
from dpo_video.extensions import AdapterFormat, ExportedAdapter
from dpo_video.paths import DIFFUSERS_FILE
from dpo_video.support.atomic import write_tensors
from dpo_video.types import ExportSpec


@final
class Diffusers(AdapterFormat):
    """Format of a pipeline's `load_lora_weights(folder)` (diffusers, `loaders/lora_pipeline.py`).

    Keys are `unet.` or `transformer.`, the module's name, and `.lora_A.weight` or `.lora_B.weight`.
    A second network has its own file, whose keys begin with the name of the first network too:
    `load_lora_weights(folder, load_into_transformer_2=True)` selects the second. diffusers reads a
    file without alpha as alpha = rank (`utils/peft_utils.py: get_peft_kwargs`), so `alpha / rank`
    is multiplied into the up matrix.
    """

    def usage(self, spec: ExportSpec) -> str:
        """The pipeline."""
        return f"Load it into diffusers' `{spec.pipeline}`:"

    def write(self, folder: Path, adapter: ExportedAdapter) -> None:
        """Write one file per network."""
        spec = adapter.spec
        prefix = next(iter(spec.networks))
        for name, layers in adapter.updates.items():
            tensors = {}
            for module, update in layers.items():
                down, up = adapter.stored(update)
                tensors[f"{prefix}.{module}.lora_A.weight"] = down
                tensors[f"{prefix}.{module}.lora_B.weight"] = up
            path = folder / spec.subfolder(name)
            write_tensors(path / DIFFUSERS_FILE, tensors, {"format": "pt"})

    def load(self, folder: Path, adapter: ExportedAdapter, network: str) -> None:
        """Load through the stock pipeline, which has the networks and nothing else."""
        spec = adapter.spec
        path = str(folder / spec.subfolder(network))
        # Text encoders and image processors are left out on purpose.
        with quiet():
            pipeline = _stock_pipeline(spec)
            options = _load_options(spec, network)
            # Without weight_name, older versions of diffusers query the hub or fail offline.
            pipeline.load_lora_weights(path, weight_name=DIFFUSERS_FILE, **options)

    def script(self, folder: Path, spec: ExportSpec, network: str) -> str:
        """`load_lora_weights`."""
        path = json.dumps(str(folder / spec.subfolder(network)), ensure_ascii=False)
        more = "".join(f", {key}={value}" for key, value in _load_options(spec, network).items())
        return f'pipe.load_lora_weights({path}, weight_name="{DIFFUSERS_FILE}"{more})'


def _load_options(spec: ExportSpec, name: str) -> dict[str, bool]:
    """Arguments of `load_lora_weights` for a network that is not the pipeline's first."""
    first = name == next(iter(spec.networks))
    return {} if first else {f"load_into_{name}": True}


def _stock_pipeline(spec: ExportSpec) -> Any:
    """The family's pipeline with the model's own networks and no other parts."""
    pipeline = getattr(diffusers, spec.pipeline)
    parts = inspect.signature(pipeline.__init__).parameters.values()
    required = [part.name for part in parts if part.default is part.empty and part.name != "self"]
    return pipeline(**{**dict.fromkeys(required), **spec.networks})
