"""Effect of a finite reference cache on loss and gradient, and the time that it saves.

    OMP_NUM_THREADS=1 python -m benchmarks.reference_cache

A policy on `tiny` takes a few steps away from its base. Then the gradients of many draws of noise
and timestep per pair are computed. A cache of K draws is a random choice of K draws per pair; a
long training on it follows the mean gradient over them. It is compared with the mean over other,
fresh draws: by cosine, length and spread. Times are processor seconds.
"""

from __future__ import annotations

import argparse
import io
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
SEED, SIZES, CACHES = 0, (1, 4, 16), 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--draws", type=int, default=48, help="draws per pair; half are the fresh ones"
    )
    parser.add_argument("--steps", type=int, default=6, help="training steps before measuring")
    parser.add_argument("--machine", default="2-core x86-64 CPU", help="in the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.pairs, arguments.draws, arguments.steps)
    versions = {"dpo-video": dpo_video.__version__}
    result = {
        "machine": arguments.machine,
        "threads": 1,
        "versions": {**versions, "torch": torch.__version__, "python": platform.python_version()},
        **result,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "reference_cache.json").write_text(json.dumps(result, indent=2) + "\n")
    print(text(result))
    (arguments.out / "reference_cache.txt").write_text(text(result))


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
    seconds: dict[str, list[float]] = {"reference": [], "policy": [], "cache": []}
    cache = ReferenceCache(store, ReferenceCacheManifest.of(model, SEED, "no"))

    def draw(pair: int, name: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        source = generator(SEED, name, pair, number)
        noise = torch.randn(1, *model.latent_shape, generator=source)
        return noise, model.sample_timesteps(1, source)

    def gradient(pair: int, name: str, number: int) -> tuple[float, np.ndarray]:
        batch = store.batch([pair])
        noise, timestep = draw(pair, name, number)
        start = time.process_time()
        prediction = reference_predictions(
            model, reference_model, noised(model, batch, noise, timestep)
        )
        middle = time.process_time()
        errors = pair_errors(
            model, policy, reference_model, batch, noise, timestep, reference_prediction=prediction
        )
        loss = Global()(errors).loss.sum()
        optimizer.zero_grad()
        loss.backward()
        seconds["reference"].append(middle - start)
        seconds["policy"].append(time.process_time() - middle)
        cached = PairDraw(pair, number)
        cache.fill([cached], lambda _: prediction)
        start = time.process_time()
        cache.read([cached])
        seconds["cache"].append(time.process_time() - start)
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
    cached, fresh = gradients[:, : noise_draws // 2], gradients[:, noise_draws // 2 :]
    target = fresh.mean(axis=(0, 1))
    return {
        "pairs": pairs,
        "draws": noise_draws,
        "steps_before": steps,
        "caches": CACHES,
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "bytes_per_prediction": sum(t.nbytes for t in cache.read([PairDraw(0, 0)])),
        "loss": {"mean": float(losses.mean()), "sd_over_draws": float(losses.std(axis=1).mean())},
        "all_cached": compare(cached.mean(axis=(0, 1)), target),
        "sizes": {
            str(k): statistics(cached, losses[:, : noise_draws // 2], target, k) for k in SIZES
        },
    }


def compare(mean: np.ndarray, target: np.ndarray) -> dict[str, float]:
    size = float(np.linalg.norm(target))
    cosine = float(mean @ target / np.linalg.norm(mean) / size)
    return {"cosine": cosine, "length": float(np.linalg.norm(mean) / size)}


def statistics(
    cached: np.ndarray, losses: np.ndarray, target: np.ndarray, size: int
) -> dict[str, float]:
    """Means over many random caches of `size` draws per pair."""
    pick = np.random.default_rng(SEED)
    pairs, noise_draws = losses.shape
    found, means = [], []
    for _ in range(CACHES):
        chosen = np.stack([pick.permutation(noise_draws)[:size] for _ in range(pairs)])
        rows = np.arange(pairs)[:, None]
        found.append(compare(cached[rows, chosen].mean(axis=(0, 1)), target))
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


def text(result: dict[str, object]) -> str:
    """The table as plain text."""
    console = Console(file=io.StringIO(), record=True, width=100)
    console.print(table(result))
    return console.export_text()


def table(result: dict[str, object]) -> Table:
    out = Table(
        title="Mean gradient over a cache of K draws per pair, compared with "
        f"{result['draws']} / 2 fresh draws"
    )
    for column in ("K", "loss", "sd over caches", "cosine", "10% to 90%", "length"):
        out.add_column(column, justify="right")
    for size, row in result["sizes"].items():  # type: ignore[attr-defined]
        out.add_row(
            size, f"{row['loss_mean']:.3f}", f"{row['loss_sd']:.3f}", f"{row['cosine']:.3f}",
            f"{row['cosine_p10']:.3f} to {row['cosine_p90']:.3f}", f"{row['length']:.2f}",
        )  # fmt: skip
    ceiling = result["all_cached"]
    out.add_row(
        "fresh", f"{result['loss']['mean']:.3f}", "", f"{ceiling['cosine']:.3f}", "",  # type: ignore[index]
        f"{ceiling['length']:.2f}",  # type: ignore[index]
    )  # fmt: skip
    seconds = result["seconds"]
    out.caption = (
        f"Seconds per pair: reference {seconds['reference']:.3f}, policy forward and backward "  # type: ignore[index]
        f"{seconds['policy']:.3f}, reading the cache {seconds['cache']:.4f}"  # type: ignore[index]
    )
    return out


if __name__ == "__main__":
    main()
