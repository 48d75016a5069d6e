"""What torch.compile would gain: a step of the small Wan as it is, and with every block compiled.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py

Compiled block by block, so that all blocks share one graph; policy and toggled reference make two.
The margin of the first step is printed too: it must stay exactly 0.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from bench_step import small_wan

from dpo_video.blocks import blocks
from dpo_video.loss.global_ import Global
from dpo_video.memory import Step
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.train import adapt
from dpo_video.types import PairBatch

STEPS = 8
TOKENS, CHANNELS = 64, 64  # of the small Wan's prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="inductor")
    backend = parser.parse_args().backend
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = small_wan(Path(folder) / "wan", torch.device("cpu"), quick=False)
    policy = adapt(model, TrainSettings(rank=16), seed=0)
    step = Step(model=model, policy=policy, anchor=Toggle().follow(policy), loss=Global())
    torch.manual_seed(0)
    size = (1, *model.latent_shape)
    batch = PairBatch(
        first=torch.randn(size), second=torch.randn(size), preference=torch.ones(1, size[2]),
        region=torch.ones(1, 1, *size[2:]), strength=torch.ones(1),
        context={"prompt_embeds": torch.randn(1, TOKENS, CHANNELS)}, keys=["0"],
    )  # fmt: skip
    noise, level = torch.randn(size), torch.full((1,), 0.5)

    def seconds() -> float:
        policy.zero_grad()
        started = time.process_time()
        step(batch, noise, level)
        return time.process_time() - started

    seconds()
    eager = [seconds() for _ in range(STEPS)]
    for block in blocks(policy):
        block.compile(backend=backend)
    first = seconds()
    compiled = [seconds() for _ in range(STEPS)]
    margin = step(batch, noise, level).margin.item()
    print(f"as it is     {median(eager):.3f} s a step")
    print(f"compiled     {median(compiled):.3f} s a step, {first:.1f} s the first")
    print(f"ratio        {median(compiled) / median(eager):.3f}; margin before training {margin:g}")


if __name__ == "__main__":
    main()
