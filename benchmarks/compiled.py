"""What memory.compile=on gains, and when: steps of small models as they are, and compiled.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py            # or --model NAME, again and again

A step is the forward and backward passes of one pair, with the toggled reference. Steps as they are
and compiled ones take turns, so that whatever else the machine does meets both. The first compiled
step makes the graphs and compiles their kernels, in one process and from an empty cache; then once
more from the cache, as a run does that goes on. Seconds are of one core, compilers included, and
not of the clock. Printed too are the margin of an adapter that is still zero, which must stay
exactly 0, and how far the gradient of one that is not moves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from bench_step import small_wan, tiny
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dpo_video.backbone.cogvideox import CogVideoX
from dpo_video.loss.global_ import Global
from dpo_video.memory.compile import last_weights
from dpo_video.memory.modes import apply_memory_modes
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import VideoModel
from dpo_video.training.lora import adapt
from dpo_video.training.step import Step
from dpo_video.types import PairBatch, Placement

RESULTS = Path(__file__).parent / "results" / "0.1.0" / "compiled.json"
STEPS = 12  # of each
CPU = torch.device("cpu")
AS_IT_IS, COMPILED = MemorySettings(), MemorySettings(compile="on")


def small_cogvideox(folder: Path, device: torch.device, quick: bool) -> VideoModel:
    """CogVideoX's real classes, random weights: 1280 tokens of 384 channels in 4 layers."""
    torch.manual_seed(0)
    heads, layers, width = (2, 1, 16) if quick else (6, 4, 64)
    parts = {
        "transformer": CogVideoXTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=width, in_channels=4, out_channels=4,
            time_embed_dim=64, text_embed_dim=64, num_layers=layers, sample_width=32,
            sample_height=32, sample_frames=17, max_text_seq_length=64,
        ),
        "vae": AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(4, 4, 4, 4),
            latent_channels=4, layers_per_block=1, norm_num_groups=2,
        ),
        "text_encoder": T5EncoderModel(
            T5Config(vocab_size=8, d_model=64, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")),
            pad_token="<pad>",
        ),
        "scheduler": CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    }  # fmt: skip
    for parameter in parts["transformer"].parameters():  # its own init predicts next to nothing
        torch.nn.init.normal_(parameter, std=0.05)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}))
    size = 32 if quick else 256
    options = CogVideoX(model=str(folder), frames=17, height=size, width=size)
    return options.load(Placement(device))


MODELS: dict[str, Callable[[Path, torch.device, bool], VideoModel]] = {
    "a small Wan": small_wan,
    "a small CogVideoX": small_cogvideox,
    "tiny, an AnimateDiff": tiny,
}


def used() -> float:
    """Seconds of one core, those of the compilers that were started included."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, whose))


def measured(name: str, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = MODELS[name](Path(folder) / "model", CPU, quick)
    policy = adapt(model, TrainSettings(rank=16), seed=0)
    step = Step(
        model=model, policy=policy, reference_model=Toggle().attach(policy), loss=Global(beta=100)
    )
    generator = torch.Generator().manual_seed(0)
    size, shapes = (1, *model.latent_shape), model.prompt_shapes()
    assert shapes is not None
    batch = PairBatch(
        first=torch.randn(size, generator=generator),
        second=torch.randn(size, generator=generator), preference=torch.ones(1, size[2]),
        region=torch.ones(1, 1, *size[2:]), strength=torch.ones(1), keys=["0"],
        context={n: torch.randn(1, *s, generator=generator) for n, s in shapes.items()},
    )  # fmt: skip
    noise, timestep = torch.randn(size, generator=generator), model.sample_timesteps(1, generator)

    def seconds(memory: MemorySettings) -> float:
        apply_memory_modes(policy, memory)
        policy.zero_grad()
        before = used()
        step(batch, noise, timestep)
        return used() - before

    def gradient(memory: MemorySettings) -> torch.Tensor:
        seconds(memory)
        found = [weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None]
        return torch.cat(found)

    seconds(AS_IT_IS)
    made = torch._dynamo.utils.counters["stats"]
    before = made["unique_graphs"]
    cold = seconds(COMPILED)
    graphs = made["unique_graphs"] - before
    margin = step(batch, noise, timestep).margin.item()
    turns = [(seconds(AS_IT_IS), seconds(COMPILED)) for _ in range(1 if quick else STEPS)]
    plain, compiled = (median(times) for times in zip(*turns, strict=True))
    ratios = sorted(each[1] / each[0] for each in turns)
    ratio = median(ratios)
    for weight in last_weights(policy):
        weight.data.normal_(std=0.01, generator=generator)
    exact, found = gradient(AS_IT_IS), gradient(COMPILED)
    torch._dynamo.reset()
    warm = seconds(COMPILED)

    def pays(first: float) -> int | None:
        """Steps until a run is done sooner; None where it never is."""
        return round(1 + (first - plain) / (plain * (1 - ratio))) if ratio < 1 else None

    return {
        "as it is": plain, "compiled": compiled, "ratio": ratio,
        "quartiles": quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
        "graphs": graphs, "first step": cold, "first step, cached": warm,
        "steps until it pays": pays(cold), "steps until it pays, cached": pays(warm),
        "margin before training": margin,
        "gradient moves by": float((exact - found).norm() / exact.norm()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing is written")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else {}
    for name in given.model or MODELS:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            torch._inductor.config.compile_threads = 1
            found[name] = measured(name, given.quick)
        print(name, *(f"  {what}: {value}" for what, value in found[name].items()), sep="\n")
        if not given.quick:
            machine = f"one core of a shared {platform.machine()} server, torch {torch.__version__}"
            RESULTS.write_text(json.dumps({"machine": machine, "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
