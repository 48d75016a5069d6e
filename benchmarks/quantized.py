"""Quantized frozen weights: this package's, beside those that diffusers loads by other libraries.

    pip install torchao
    OMP_NUM_THREADS=1 python -m benchmarks.quantized

A small Wan with random weights and a LoRA. Reported: the relative error of its prediction, the time
of a forward and backward pass relative to native weights (alternating), and the peak of tensors.
Written to quantized.json. diffusers' bitsandbytes weights are left out: it packs them on GPUs only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import TorchAoConfig, WanTransformer3DModel
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig

from benchmarks.support.small_models import small_wan
from dpo_video.memory.packed_weights import pack_frozen_weights
from dpo_video.memory.peak import peak_bytes
from dpo_video.settings import TrainSettings
from dpo_video.training.lora import adapt

RESULTS = Path(__file__).parent / "results" / "0.1.0"
NATIVE, OURS, THEIRS = "native", "int8", "diffusers with torchao, int8"
CPU = torch.device("cpu")
ROUNDS = 5


def candidate(name: str, folder: Path) -> tuple[Any, Callable[[], Tensor]]:
    """The policy, and a forward and backward pass that returns the prediction."""
    model: Any = small_wan(folder, CPU, quick=False)
    if name == THEIRS:
        network = WanTransformer3DModel.from_pretrained(
            folder / "transformer", torch_dtype=torch.float32,
            quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        )  # fmt: skip
        model.denoiser = network.requires_grad_(False).eval()
    policy = adapt(model, TrainSettings(rank=16, alpha=16), 0)
    if name == OURS:
        pack_frozen_weights(policy, CPU, "int8")
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, *model.latent_shape, generator=generator)
    context = {
        key: torch.randn(1, *shape, generator=generator)
        for key, shape in model.prompt_shapes().items()
    }

    def step() -> Tensor:
        output = model.predict(policy, noisy, torch.tensor([500.0]), context)
        output.square().sum().backward()
        return output.detach()

    return policy, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of quantized.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = {name: candidate(name, Path(folder) / "wan") for name in (NATIVE, OURS, THEIRS)}
    outputs = {name: step() for name, (_, step) in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(ROUNDS):
        for name, (_, step) in made.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    rows = {}
    for name, (policy, step) in made.items():
        peak = peak_bytes(lambda step=step: bool(step().any()), networks=[policy]).total
        error = (outputs[name] - outputs[NATIVE]).norm() / outputs[NATIVE].norm()
        ratios = (a / b for a, b in zip(seconds[name], seconds[NATIVE], strict=True))
        rows[name] = {
            "error": float(error), "relative_time": median(ratios), "peak_mib": peak / 2**20
        }  # fmt: skip
    versions = {name: version(name) for name in ("torch", "diffusers", "torchao")}
    result = {"versions": versions, "rounds": ROUNDS, "rows": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "quantized.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
