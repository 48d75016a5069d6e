"""Memory of an evaluation against its number of videos, measured on `tiny`.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluation_memory

Every number of videos is evaluated in a process of its own, on the CPU, with few sampling steps;
its peak is the largest resident memory that the system reports. Beside it stands, computed, what
the pixels of all videos would take, for `tiny` and for Wan. Written to evaluation_memory.json and
evaluation_memory.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "0.1.0"
COUNTS = (2, 8, 24)
SHAPES = {"tiny, 16x64x64": (16, 64, 64), "wan, 81x480x832": (81, 480, 832)}
MIB = 2**20


def train(folder: Path) -> None:
    """A run of one step."""
    import dpo_video as dv

    dv.train(
        "jitter", backbone="tiny", loss="global", count=1, steps=1, rank=2, out=folder,
        gradient_accumulation_steps=1, validation_videos=0, report_to="none", device="cpu",
        set={"pairs.num_inference_steps": 2},
    )  # fmt: skip


def evaluate(run: Path, out: Path, count: int) -> None:
    """Evaluate `count` videos of each model; print the process's peak in bytes."""
    import dpo_video as dv

    dv.evaluate(
        run, out=out, num_prompts=count, num_inference_steps=2, device="cpu",
        metrics=["frame_difference"],
    )  # fmt: skip
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def held(count: int, frames: int, height: int, width: int) -> float:
    """MiB of the pixels of `count` videos of two models, in fp32."""
    return 2 * count * frames * height * width * 3 * 4 / MIB


def markdown(rows: list[dict[str, float]]) -> str:
    """The table in Markdown."""
    names = " | ".join(f"all pixels of {name}, MiB" for name in SHAPES)
    lines = [f"| videos of each model | peak, MiB | {names} |", "|---|---|---|---|"]
    for row in rows:
        shown = " | ".join(f"{row[name]:,.0f}" for name in SHAPES)
        lines.append(f"| {row['videos']} | {row['peak_mib']:.0f} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=3, metavar=("RUN", "OUT", "COUNT"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if options.one:
        evaluate(Path(options.one[0]), Path(options.one[1]), int(options.one[2]))
        sys.exit()
    if options.train:
        train(options.train)
        sys.exit()
    with tempfile.TemporaryDirectory() as scratch:
        # This process stays small: its peak would count as that of every process it starts.
        module = [sys.executable, "-m", "benchmarks.evaluation_memory"]
        subprocess.run([*module, "--train", f"{scratch}/run"], check=True)
        rows = []
        for count in COUNTS:
            command = [*module, "--one", f"{scratch}/run", f"{scratch}/{count}", str(count)]
            peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            row = {"videos": count, "peak_mib": peak / MIB}
            rows.append(row | {name: held(count, *shape) for name, shape in SHAPES.items()})
            print(rows[-1], flush=True)
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "evaluation_memory.json").write_text(json.dumps(rows, indent=1) + "\n")
            (options.out / "evaluation_memory.md").write_text(markdown(rows))
