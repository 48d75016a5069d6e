"""The same training in several ways of running it: equal hashes, or the reason.

    OMP_NUM_THREADS=1 python -m benchmarks.trust.processes

One process takes two pairs a step one after the other (accumulation 2), two processes take one
each and average their gradients by gloo. A half of each gradient is exact in binary floating
point and so is the order of two summands, so that the adapters must be equal to the bit; with more
processes, or other libraries for the exchange, they are so to rounding. Besides: two processes that
hold the frozen weights together, asked for as a launcher asks for FSDP; two of which one is killed
after the second step, and which the launcher starts again (--max-restarts); two under launchers of
their own, as on two nodes, of which one is lost with its launcher and replaced; and two that are
killed there, with one that goes on alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

STEPS = 4
SAVED = 2  # steps, at which some are killed


def command(processes: int, arguments: Sequence[str], restarts: int = 0) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "dpo_video", *arguments]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
              "--max-restarts", str(restarts)]  # fmt: skip
    return [sys.executable, *launch, "-m", "dpo_video", *arguments]


def node(port: int, arguments: Sequence[str]) -> list[str]:
    """The command of one of two nodes, with one process each, that meet at a port."""
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-id=nodes",
              "--max-restarts=2", "--rdzv-backend=c10d",
              f"--rdzv-endpoint=localhost:{port}"]  # fmt: skip
    return [sys.executable, *launch, "-m", "dpo_video", *arguments]


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("localhost", 0))
        return int(it.getsockname()[1])


def adapter(run: Path) -> str:
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    data = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(data).hexdigest()[:16]


def workers(launcher: int) -> list[int]:
    """The processes that a launcher started, by rank; it numbers them in that order."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return sorted(map(int, children))


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """As a power cut does: the launcher first, so that it cannot say anything about the others."""
    started = workers(launcher.pid)
    for process in (launcher.pid, *started):
        os.kill(process, signal.SIGKILL)
    launcher.wait()


def listens(port: int) -> bool:
    with socket.socket() as it:
        return it.connect_ex(("localhost", port)) == 0


def until(reached: Callable[[], bool], launcher: subprocess.Popen[bytes]) -> None:
    while not reached():
        if launcher.poll() is not None:
            raise RuntimeError("it ended before it was to be killed")
        time.sleep(0.005)


class Runs:
    """The runs in a folder, each by its name."""

    def __init__(self, folder: Path, model: Sequence[str]) -> None:
        self.folder = folder
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.run(
            1,
            [
                "build",
                "--pairs=jitter",
                "--set=pairs.num_inference_steps=2",
                "--prompt=a red square",
                *model,
                "--count=5",
                "--out=pairs",
                "--set=build.previews=false",
            ],
        )
        self.train = ["train", "--pairs=pairs/", "--loss=global", *model, f"--steps={STEPS}",
                      f"--set=train.save_steps={SAVED}", "--set=train.validation_videos=0",
                      "--set=train.rank=2", "--set=train.report_to=none"]  # fmt: skip

    def run(
        self, processes: int, arguments: Sequence[str], asks: Mapping[str, str] | None = None
    ) -> None:
        environment = {**self.environment, **(asks or {})}
        done = subprocess.run(
            command(processes, arguments), cwd=self.folder, env=environment, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-4000:]}")

    def alone(self, name: str) -> None:
        self.run(1, [*self.train, "--set=train.gradient_accumulation_steps=2", f"--out={name}"])

    def two(self, name: str) -> None:
        self.run(2, self.arguments(name))

    def sharded(self, name: str) -> None:
        self.run(2, self.arguments(name), {"ACCELERATE_USE_FSDP": "true"})
        if "shard = 2" not in (self.folder / name / "run.toml").read_text():
            raise RuntimeError("FSDP was asked for, and the weights were not shared")

    def restarted(self, name: str) -> None:
        launcher = self.start(command(2, self.arguments(name, "--auto-resume"), restarts=1))
        until(lambda: self.saved(name), launcher)
        os.kill(workers(launcher.pid)[1], signal.SIGKILL)
        if launcher.wait():
            raise RuntimeError("the launcher gave up")

    def replaced(self, name: str) -> None:
        port = free_port()
        one = node(port, self.arguments(name, "--auto-resume"))
        # Else a node that comes later waits for an address that its launcher's torch never tells.
        apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        host = self.start(one, apart)
        until(lambda: listens(port), host)
        lost = self.start(one, apart)
        until(lambda: self.saved(name), host)
        kill(lost)
        replacement = self.start(one, apart)
        if host.wait() or replacement.wait():
            raise RuntimeError("a launcher gave up")

    def killed(self, name: str) -> None:
        launcher = self.start(command(2, self.arguments(name)))
        until(lambda: self.saved(name), launcher)
        kill(launcher)
        self.run(
            1, ["train", f"--out={name}", "--resume", "--set=train.gradient_accumulation_steps=2"]
        )

    def arguments(self, name: str, *more: str) -> list[str]:
        return [*self.train, "--set=train.gradient_accumulation_steps=1", f"--out={name}", *more]

    def start(
        self, command: Sequence[str], more: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=self.folder, env={**self.environment, **(more or {})},
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def saved(self, name: str) -> bool:
        return (self.folder / name / "checkpoints/latest").exists()


WAYS: Mapping[str, tuple[str, Callable[[Runs, str], None]]] = {
    "one process": ("alone", Runs.alone),
    "two processes": ("two", Runs.two),
    "two that hold the frozen weights together": ("sharded", Runs.sharded),
    "two, one is killed, the launcher restarts them": ("restarted", Runs.restarted),
    "two nodes, one is lost and replaced": ("replaced", Runs.replaced),
    "two, both are killed, one goes on": ("killed", Runs.killed),
}


def hashes(folder: Path, model: Sequence[str], ways: Sequence[str] = tuple(WAYS)) -> dict[str, str]:
    """The adapter that each way ends with."""
    runs = Runs(folder, model)
    found = {}
    for way in ways:
        name, run = WAYS[way]
        run(runs, name)
        found[way] = adapter(folder / name)
    return found


def small_model(folder: Path) -> list[str]:
    """What names a small random AnimateDiff, saved in a folder."""
    from tests.small_animatediff import SHAPE, save_small_animatediff

    checkpoint = save_small_animatediff(folder)
    return ["--backbone=animatediff", f"--set=backbone.model={checkpoint}",
            f"--set=backbone.frames={SHAPE.frames}", f"--set=backbone.height={SHAPE.height}",
            f"--set=backbone.width={SHAPE.width}", "--device=cpu"]  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = hashes(Path(place), small_model(Path(place) / "small"))
    for name, digest in found.items():
        print(f"{digest}  {name}")
    if len(set(found.values())) > 1:
        print("They differ. Two summands of a gradient were rounded differently, or a pair was "
              "drawn twice: compare the log.jsonl of the runs, step by step.")  # fmt: skip
        sys.exit(1)


if __name__ == "__main__":
    main()
