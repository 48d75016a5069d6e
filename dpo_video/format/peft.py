"""PEFT's own format."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, ClassVar, final

from peft import PeftModel

from dpo_video.diffusion.adapters import remove_adapter
from dpo_video.extensions import AdapterFormat, ExportedAdapter
from dpo_video.support.atomic import write_tensors
from dpo_video.types import ExportSpec


@final
class PEFT(AdapterFormat):
    """Format of `PeftModel.from_pretrained(network, folder)`; adapter_config.json has alpha."""

    library: ClassVar[str] = "peft"
    imports: ClassVar[tuple[str, ...]] = ("from peft import PeftModel",)

    def usage(self, spec: ExportSpec) -> str:
        """The pipeline."""
        return f"Load it into diffusers' `{spec.pipeline}` by PEFT:"

    def write(self, folder: Path, adapter: ExportedAdapter) -> None:
        """Write one folder per network."""
        spec, dtype = adapter.spec, adapter.dtype
        for name, layers in adapter.updates.items():
            path = folder / spec.subfolder(name)
            path.mkdir(exist_ok=True)
            tensors = {}
            for module, update in layers.items():
                for key, factor in (("lora_A", update.down), ("lora_B", update.up)):
                    stored = factor.to(dtype or factor.dtype)
                    tensors[f"base_model.model.{module}.{key}.weight"] = stored
            write_tensors(path / "adapter_model.safetensors", tensors, {"format": "pt"})
            config = copy.deepcopy(adapter.config)
            config.target_modules = sorted(layers)
            config.base_model_name_or_path, config.revision = (
                spec.file or spec.source, spec.revision,
            )  # fmt: skip
            config.inference_mode = True
            config.save_pretrained(str(path))

    def load(self, folder: Path, adapter: ExportedAdapter, network: str) -> None:
        """Load by PEFT, which changes the network in place; the wrapper is dropped."""
        spec = adapter.spec
        PeftModel.from_pretrained(spec.networks[network], str(folder / spec.subfolder(network)))

    def unload(self, network: Any) -> None:
        """Remove the adapter layer by layer."""
        remove_adapter(network)

    def script(self, folder: Path, spec: ExportSpec, network: str) -> str:
        """`PeftModel.from_pretrained`."""
        path = json.dumps(str(folder / spec.subfolder(network)), ensure_ascii=False)
        return f"pipe.{network} = PeftModel.from_pretrained(pipe.{network}, {path})"
