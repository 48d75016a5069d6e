"""Contract of export formats."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Generator

from dpo_video.exporting.export import export
from dpo_video.extensions import AdapterFormat, MergedFormat
from dpo_video.strategies import VideoModel
from dpo_video.testing.contracts import check_options
from dpo_video.testing.laws import contract, law


@contract
def check_format(format: AdapterFormat | MergedFormat, model: VideoModel) -> None:
    """Check that an adapter is written, and loaded back as the same.

    Args:
        format: The strategy.
        model: A small model that other programs run, such as `tiny`; it is not to be used
            afterwards.
    """
    check_options(format)
    name = type(format).__name__
    spec = model.export_spec()
    if spec is None:
        raise AssertionError(f"{type(model).__name__} has no export_spec. Pass another model.")
    law(format.usage(spec).strip(), f"{name}.usage says nothing. Say how to load the export.")
    if isinstance(format, MergedFormat):  # the engine writes it
        return
    config = LoraConfig(r=2, lora_alpha=6, target_modules=model.lora_targets())
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = get_peft_model(model.denoiser, config)
        generator = Generator().manual_seed(1)
        for key, weight in policy.named_parameters():
            if ".lora_" in key:
                weight.data = 0.1 * torch.randn(weight.shape, generator=generator).to(weight)
        policy.save_pretrained(str(Path(folder, "adapter")))
        model.denoiser = policy.unload()
        out = Path(folder, "out")
        export(
            model, Path(folder, "adapter"), format, out, name="mine",
            card=lambda spec, check: "card\n", reload=lambda folder: model,
        )  # fmt: skip
        written = [path for path in out.rglob("*") if path.is_file() and path.name != "README.md"]
        law(written, f"{name} writes no file.")
