"""A short training of the small model on random pairs, shared by the tests that train."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from small_animatediff import load_small

from dpo_video.data.store import Manifest, PairStore
from dpo_video.loss.region import Region
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Loss, Reference, VideoModel
from dpo_video.support.report import StepEvent
from dpo_video.training.listeners import Listener
from dpo_video.training.run import train
from dpo_video.training.run_dir import latest_checkpoint
from dpo_video.types import Pair

SETTINGS = TrainSettings(
    steps=6,
    batch_size=1,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    warmup_steps=2,
    rank=2,
    alpha=4,
    save_steps=2,
    validation_videos=0,
    report_to="none",
)


def make_store(folder: Path, model: VideoModel, pairs: int = 5) -> PairStore:
    """Random pairs with half the picture as their region."""
    manifest = Manifest(
        recipe={"made": "at random"},
        identity=model.identity,
        latent_shape=model.latent_shape,
        fps=model.shape.fps,
    )
    store = PairStore.create(folder, manifest)
    generator = torch.Generator().manual_seed(7)
    region = torch.zeros(1, *model.latent_shape[1:])
    region[..., : model.latent_shape[3] // 2] = 1
    for i in range(len(store), pairs):
        first, other = torch.randn(2, *model.latent_shape, generator=generator)
        pair = Pair(
            first=first,
            second=torch.where(region > 0, other, first),
            preference=torch.ones(model.latent_shape[1]),
            region=region,
            prompt=f"a red square moving {('left', 'right')[i % 2]} slowly",
            source="random",
            strength=0.8,
        )
        store.append(pair, model.encode_prompts([pair.prompt]))
    return store


def run(
    folder: Path,
    store: PairStore,
    out: Path,
    settings: TrainSettings = SETTINGS,
    *,
    loss: Loss | None = None,
    reference: Reference | None = None,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    accelerator: Accelerator | None = None,
    **more: Any,
) -> list[StepEvent]:
    return list(
        train(
            load_small(folder),
            store,
            loss or Region(),
            reference or Toggle(),
            settings,
            seed=0,
            out=out,
            accelerator=accelerator or Accelerator(cpu=True),
            resume=resume,
            listeners=listeners,
            **more,
        )
    )


def adapter_hash(out: Path) -> str:
    weights = latest_checkpoint(out) / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()
