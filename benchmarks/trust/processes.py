"""The same training as one process, as two, and killed and gone on with: three hashes.

    OMP_NUM_THREADS=1 python -m benchmarks.trust.processes

One process takes two pairs a step one after the other (accumulation 2), two processes take one
each and average their gradients by gloo. A half of each gradient is exact in binary floating
point and so is the order of two summands, so that the adapters must be equal to the bit; with more
processes, or other libraries for the exchange, they are so to rounding. The third run has two
processes until it is killed after its second step, and one from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

STEPS = 4


def command(processes: int, arguments: Sequence[str]) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "dpo_video", *arguments]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launch, "-m", "dpo_video", *arguments]


def adapter(run: Path) -> str:
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    data = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(data).hexdigest()[:16]


def hashes(folder: Path, model: Sequence[str]) -> dict[str, str]:
    """The adapter of each of the three runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run_it(processes: int, arguments: Sequence[str]) -> None:
        subprocess.run(command(processes, arguments), cwd=folder, env=environment, check=True)

    run_it(1, ["build", "--pairs=jitter", "--set=pairs.steps=2", "--prompt=a red square", *model,
               "--count=5", "--out=pairs", "--set=build.previews=false"])  # fmt: skip
    train = ["train", "--pairs=pairs/", "--loss=global", *model, f"--steps={STEPS}",
             "--set=train.save_every=2", "--set=train.samples=0", "--set=train.rank=2",
             "--set=train.tracker=none"]  # fmt: skip
    run_it(1, [*train, "--set=train.accumulation=2", "--out=one"])
    two = [*train, "--set=train.accumulation=1"]
    run_it(2, [*two, "--out=two"])
    process = subprocess.Popen(
        command(2, [*two, "--out=killed"]), cwd=folder, env=environment, start_new_session=True
    )
    while not (folder / "killed/checkpoints/latest").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run_it(1, ["train", "--out=killed", "--resume", "--set=train.accumulation=2"])
    return {
        "one process": adapter(folder / "one"),
        "two processes": adapter(folder / "two"),
        "two processes, killed, one goes on": adapter(folder / "killed"),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    from tests.small_animatediff import SHAPE, save_small_animatediff

    with tempfile.TemporaryDirectory() as place:
        checkpoint = save_small_animatediff(Path(place) / "small")
        model = ["--backbone=animatediff", f"--set=backbone.model={checkpoint}",
                 f"--set=backbone.frames={SHAPE.frames}", f"--set=backbone.height={SHAPE.height}",
                 f"--set=backbone.width={SHAPE.width}", "--device=cpu"]  # fmt: skip
        found = hashes(Path(place), model)
    for name, digest in found.items():
        print(f"{digest}  {name}")
    if len(set(found.values())) > 1:
        print("They differ. Two summands of a gradient were rounded differently, or a pair was "
              "drawn twice: compare the log.jsonl of the runs, step by step.")  # fmt: skip
        sys.exit(1)


if __name__ == "__main__":
    main()
