"""Which settings lower the warping error without freezing the videos? One command, one table.

    python benchmarks/headline.py                     # every setting of headline.toml, resumable
    python benchmarks/headline.py --only NAME --seeds 0 1 2
    python benchmarks/headline.py --table             # only print what was measured

Every setting is trained on `tiny` with each training seed and drawn with the same 47 prompts and
noises as the base, which is drawn once. Settings that failed stay in the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dpo_video import config as configuration
from dpo_video.build import build
from dpo_video.checkpoint import load_state, save_state
from dpo_video.evaluate import draw, merged, values
from dpo_video.files import write_text
from dpo_video.frechet import frechet_distance
from dpo_video.session import load_model, open_source, open_store
from dpo_video.store import PairStore
from dpo_video.tiny import judge, scenes
from dpo_video.train import latest_checkpoint, train
from dpo_video.verdict import MetricResult, Role, judge_evaluation, judge_training

HERE = Path(__file__).parent
BOUNDS = {"warp_error": -0.257, "frame_difference": -0.183}  # Video-DPO's headline
MOTION = 0.03  # largest relative change of the dynamic degree that counts as keeping it


def settings() -> dict[str, dict[str, Any]]:
    """Name to {pairs, loss, set}, as headline.toml lists them."""
    return tomllib.loads((HERE / "headline.toml").read_text())


def resolve(setting: dict[str, Any], seed: int) -> configuration.Config:
    """The configuration of a setting; pairs and evaluation do not depend on the training seed."""
    return configuration.resolve(
        choices={kind: setting.get(kind) for kind in ("pairs", "loss", "reference")},
        flags={"run.seed": seed, "train.tracker": "none", "run.device": "cpu"},
        assignments=setting.get("set", []),
    )


def draw_base(work: Path) -> torch.Tensor:
    """The base model's videos, drawn once."""
    path = work / "base.safetensors"
    if not path.exists():
        config = resolve({}, 0)
        model = load_model(config, torch.device("cpu"))
        prompts = config.backbone.prompts(config.evaluate.seeds)
        drawn = torch.cat(list(draw(model, model.denoiser, prompts, config.evaluate)))
        save_state(path, {"videos": drawn})
    videos: torch.Tensor = load_state(path)["videos"]
    return videos


def run(name: str, setting: dict[str, Any], seed: int, work: Path) -> dict[str, Any]:
    """Build, train, draw and measure one setting with one training seed."""
    config = resolve(setting, seed)
    device = torch.device("cpu")
    model = load_model(config, device)
    if isinstance(config.pairs, Path):
        store = PairStore(config.pairs)
    else:
        source = open_source(config, model)
        store = open_store(config, config.pairs, model, source.fingerprint, work / "pairs", False)
        reports = build(
            store, source.clips, config.pairs, model, config.build, seed=config.run.seed
        )
        for _ in reports:
            pass
    out = work / f"{name}-{seed}"
    started = time.monotonic()
    progress = list(
        train(
            model,
            store,
            config.loss,
            config.reference,
            config.train,
            seed=seed,
            out=out,
            accelerator=Accelerator(cpu=True),
        )
    )
    trained = time.monotonic() - started
    prompts = config.backbone.prompts(config.evaluate.seeds)
    denoiser = merged(load_model(config, device), latest_checkpoint(out) / "adapter")
    tuned = torch.cat(list(draw(model, denoiser, prompts, config.evaluate)))
    base = draw_base(work)
    results = [
        MetricResult.measured(
            metric_name,
            values(metric, base, prompts, config.evaluate.batch),
            values(metric, tuned, prompts, config.evaluate.batch),
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
            role=Role(metric.role),
        )
        for metric_name, metric in config.metrics.items()
    ]
    reports_made = [p.report for p in progress]
    slope = getattr(config.loss, "beta", 1.0)
    return {
        "setting": name,
        "seed": seed,
        "seconds_of_training": trained,
        "training": judge_training(reports_made, slope=slope).model_dump(mode="json"),
        "verdict": judge_evaluation(results, tolerance=config.evaluate.tolerance).headline,
        "metrics": {result.name: result.difference.model_dump() for result in results},
        "frechet": {"base": frechet(base), "tuned": frechet(tuned)},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
    }


def frechet(videos: torch.Tensor) -> float:
    """Judge-feature distance to as many held-out real clips."""
    drawn = scenes.draw_scenes(len(videos), torch.Generator().manual_seed(77_000_000))
    real = scenes.render(drawn).transpose(1, 2)
    return float(frechet_distance(judge.video_features(real), judge.video_features(videos)))


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: relative change of each metric, and whether the bounds hold."""
    if not rows:
        return "Nothing measured yet."
    names = list(rows[0]["metrics"])
    lines = [
        "| setting | seed | " + " | ".join(names) + " | Frechet | bounds | verdict |",
        "|" + "---|" * (len(names) + 5),
    ]
    for row in sorted(rows, key=lambda row: (row["setting"], row["seed"])):
        changes = {name: row["metrics"][name]["relative"] for name in names}
        held = all(changes[name] <= bound for name, bound in BOUNDS.items())
        held = held and abs(changes["dynamic_degree"]) <= MOTION
        cells = [f"{changes[name]:+.1%}" for name in names]
        distance = f"{row['frechet']['base']:.2f} -> {row['frechet']['tuned']:.2f}"
        lines.append(
            f"| {row['setting']} | {row['seed']} | "
            + " | ".join([*cells, distance, "yes" if held else "no", row["verdict"]])
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", help="names of settings")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=Path("runs/headline"))
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, setting in settings().items():
        if options.table or (options.only and name not in options.only):
            continue
        for seed in options.seeds:
            path = options.work / "results" / f"{name}-{seed}.json"
            if not path.exists():
                write_text(path, json.dumps(run(name, setting, seed, options.work), indent=2))
                print(table([json.loads(path.read_text())]), flush=True)
    found = sorted((options.work / "results").glob("*.json"))
    print(table([json.loads(path.read_text()) for path in found]))


if __name__ == "__main__":
    main()
