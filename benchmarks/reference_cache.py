"""What a finite bank of draws does to loss and gradient, and what it saves.

    OMP_NUM_THREADS=1 python benchmarks/bank.py

A policy on `tiny` is moved away from its base by a few steps. Then the gradient of every one of
many draws of each pair is taken. A bank of K draws is K of them a pair, picked at random; the mean
gradient over such a bank is what a long training on it follows. It is compared with the mean over
other, fresh draws: by its angle, its size and its scatter. Times are the process's own, which other
load on the machine does not stretch.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import dpo_video
from dpo_video.backbone.tiny import Tiny
from dpo_video.data.build import build, in_order
from dpo_video.data.store import Manifest, PairStore
from dpo_video.loss.global_ import Global
from dpo_video.pairs.jitter import Jitter
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import BuildSettings, TrainSettings
from dpo_video.support.rng import generator
from dpo_video.training.lora import adapt
from dpo_video.training.objective import noised, pair_errors, reference_predictions
from dpo_video.training.reference_cache import PairDraw, ReferenceCache, ReferenceCacheManifest
from dpo_video.types import Placement

RESULTS = Path(__file__).parent / "results" / "0.1.0"
SEED, SIZES, BANKS = 0, (1, 4, 16), 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--draws", type=int, default=48, help="of each pair; half are the truth")
    parser.add_argument("--steps", type=int, default=6, help="that move the policy first")
    parser.add_argument("--machine", default="2-core x86-64 CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.pairs, arguments.noise_draws, arguments.steps)
    versions = {"dpo-video": dpo_video.__version__} if hasattr(dpo_video, "__version__") else {}
    result = {
        "machine": arguments.machine,
        "threads": 1,
        "versions": {**versions, "torch": torch.__version__, "python": platform.python_version()},
        **result,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "bank.json").write_text(json.dumps(result, indent=2) + "\n")
    console = Console(record=True, width=100)
    console.print(table(result))
    (RESULTS / "bank.txt").write_text(console.export_text())


def measure(folder: Path, pairs: int, noise_draws: int, steps: int) -> dict[str, object]:
    model = Tiny().load(Placement())
    manifest = Manifest(
        recipe={}, identity=model.identity, latent_shape=model.latent_shape, fps=model.shape.fps
    )
    store = PairStore.create(folder / "pairs", manifest)
    clips = Tiny().clips(SEED)
    assert clips is not None
    list(
        build(
            store,
            in_order(clips),
            Jitter(chosen="clip"),
            model,
            BuildSettings(count=pairs, previews=False),
            seed=SEED,
        )
    )
    settings = TrainSettings(rank=4, alpha=8)
    policy = adapt(model, settings, SEED)
    reference_model = Toggle().attach(policy)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4)
    seconds: dict[str, list[float]] = {"reference": [], "policy": [], "bank": []}
    bank = ReferenceCache(store, ReferenceCacheManifest.of(model, SEED, "no"))

    def draw(pair: int, name: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        source = generator(SEED, name, pair, number)
        noise = torch.randn(1, *model.latent_shape, generator=source)
        return noise, model.sample_timesteps(1, source)

    def gradient(pair: int, name: str, number: int) -> tuple[float, np.ndarray]:
        batch = store.batch([pair])
        noise, timestep = draw(pair, name, number)
        start = time.process_time()
        known = reference_predictions(model, reference_model, noised(model, batch, noise, timestep))
        middle = time.process_time()
        errors = pair_errors(
            model, policy, reference_model, batch, noise, timestep, reference_prediction=known
        )
        loss = Global()(errors).loss.sum()
        optimizer.zero_grad()
        loss.backward()
        seconds["reference"].append(middle - start)
        seconds["policy"].append(time.process_time() - middle)
        visit = PairDraw(pair, number)
        bank.fill([visit], lambda _: known)
        start = time.process_time()
        bank.read([visit])
        seconds["bank"].append(time.process_time() - start)
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        return loss.item(), flat.numpy().copy()

    for step in range(steps):
        gradient(step % pairs, "move", noise_draws + step)
        optimizer.step()
    losses = np.zeros((pairs, noise_draws))
    rows: list[list[np.ndarray]] = []
    for pair in range(pairs):
        rows.append([])
        for number in range(noise_draws):
            losses[pair, number], row = gradient(pair, "draw", number)
            rows[-1].append(row)
        print(f"pair {pair + 1} of {pairs}: {time.process_time():.0f} s", flush=True)
    gradients = np.array(rows, dtype=np.float64)  # [pairs, draws, weights]
    banked, fresh = gradients[:, : noise_draws // 2], gradients[:, noise_draws // 2 :]
    truth = fresh.mean(axis=(0, 1))
    return {
        "pairs": pairs,
        "draws": noise_draws,
        "steps_before": steps,
        "banks": BANKS,
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "bytes_per_prediction": sum(t.nbytes for t in bank.read([PairDraw(0, 0)])),
        "loss": {"mean": float(losses.mean()), "sd_over_draws": float(losses.std(axis=1).mean())},
        "all_banked": compare(banked.mean(axis=(0, 1)), truth),
        "sizes": {
            str(k): statistics(banked, losses[:, : noise_draws // 2], truth, k) for k in SIZES
        },
    }


def compare(mean: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    size = float(np.linalg.norm(truth))
    cosine = float(mean @ truth / np.linalg.norm(mean) / size)
    return {"cosine": cosine, "length": float(np.linalg.norm(mean) / size)}


def statistics(
    banked: np.ndarray, losses: np.ndarray, truth: np.ndarray, size: int
) -> dict[str, float]:
    """Over many random banks of a size."""
    pick = np.random.default_rng(SEED)
    pairs, noise_draws = losses.shape
    found, means = [], []
    for _ in range(BANKS):
        chosen = np.stack([pick.permutation(noise_draws)[:size] for _ in range(pairs)])
        rows = np.arange(pairs)[:, None]
        found.append(compare(banked[rows, chosen].mean(axis=(0, 1)), truth))
        means.append(losses[rows, chosen].mean())
    cosines = np.array([each["cosine"] for each in found])
    return {
        "loss_mean": float(np.mean(means)),
        "loss_sd": float(np.std(means)),
        "cosine": float(cosines.mean()),
        "cosine_p10": float(np.quantile(cosines, 0.1)),
        "cosine_p90": float(np.quantile(cosines, 0.9)),
        "length": float(np.mean([each["length"] for each in found])),
    }


def table(result: dict[str, object]) -> Table:
    out = Table(
        title=f"The mean gradient over a bank of K draws a pair, against {result['draws']} / 2 "
        "fresh ones"
    )
    for column in ("K", "loss", "sd over banks", "cosine", "10% to 90%", "length"):
        out.add_column(column, justify="right")
    for size, row in result["sizes"].items():  # type: ignore[attr-defined]
        out.add_row(
            size, f"{row['loss_mean']:.3f}", f"{row['loss_sd']:.3f}", f"{row['cosine']:.3f}",
            f"{row['cosine_p10']:.3f} to {row['cosine_p90']:.3f}", f"{row['length']:.2f}",
        )  # fmt: skip
    ceiling = result["all_banked"]
    out.add_row(
        "fresh", f"{result['loss']['mean']:.3f}", "", f"{ceiling['cosine']:.3f}", "",  # type: ignore[index]
        f"{ceiling['length']:.2f}",  # type: ignore[index]
    )  # fmt: skip
    seconds = result["seconds"]
    out.caption = (
        f"Seconds of one pair: reference {seconds['reference']:.3f}, policy forward and backward "  # type: ignore[index]
        f"{seconds['policy']:.3f}, a read of the bank {seconds['bank']:.4f}"  # type: ignore[index]
    )
    return out


if __name__ == "__main__":
    main()
