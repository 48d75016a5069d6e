"""The same training in one and in several processes must produce identical adapters.

    OMP_NUM_THREADS=1 python -m benchmarks.trust.processes

One process takes two pairs per step in sequence (accumulation 2); two processes take one each and
average their gradients with gloo. Halving a gradient is exact in binary floating point, and the sum
of two terms does not depend on their order, so the adapters must be identical to the bit; with more
processes or other communication libraries they agree to rounding. Further: two processes whose
frozen weights FSDP2 shards, as a launcher requests it; two such ones of which one is killed after
the second step and which the launcher restarts (--max-restarts); two with separate launchers, as on
two nodes, of which one is lost with its launcher and replaced; and two that are killed, resumed by
one.
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
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as accelerate launch sets them
SAVED = 2  # steps until the checkpoint after which processes are killed


def command(processes: int, arguments: Sequence[str], restarts: int = 0) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "dpo_video", *arguments]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
              "--max-restarts", str(restarts)]  # fmt: skip
    return [sys.executable, *launch, "-m", "dpo_video", *arguments]


def node(port: int, arguments: Sequence[str]) -> list[str]:
    """The command of one of two nodes with one process each, with the rendezvous at a port."""
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-id=nodes",
              "--max-restarts=2", "--rdzv-backend=c10d",
              f"--rdzv-endpoint=localhost:{port}"]  # fmt: skip
    return [sys.executable, *launch, "-m", "dpo_video", *arguments]


def free_port() -> int:
    with socket.socket() as unbound:
        unbound.bind(("localhost", 0))
        return int(unbound.getsockname()[1])


def adapter(run: Path) -> str:
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    data = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(data).hexdigest()[:16]


def workers(launcher: int) -> list[int]:
    """Ids of the processes that a launcher started, by rank, which is their order of creation."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return sorted(map(int, children))


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """Kill a launcher and its processes; the launcher first, so that it reports nothing."""
    started = workers(launcher.pid)
    for process in (launcher.pid, *started):
        os.kill(process, signal.SIGKILL)
    launcher.wait()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


def until(reached: Callable[[], bool], launcher: subprocess.Popen[bytes]) -> None:
    while not reached():
        if launcher.poll() is not None:
            raise RuntimeError("the launcher ended before it was killed")
        time.sleep(0.005)


class Runs:
    """Runs in a folder, each under its name."""

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
        self, processes: int, arguments: Sequence[str], more: Mapping[str, str] | None = None
    ) -> None:
        environment = {**self.environment, **(more or {})}
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
        self.run(2, self.arguments(name), FSDP)

    def restarted(self, name: str) -> None:
        launcher = self.start(command(2, self.arguments(name, "--auto-resume"), restarts=1), FSDP)
        until(lambda: self.saved(name), launcher)
        os.kill(workers(launcher.pid)[1], signal.SIGKILL)
        if launcher.wait():
            raise RuntimeError("the launcher gave up")

    def replaced(self, name: str) -> None:
        port = free_port()
        one = node(port, self.arguments(name, "--auto-resume"))
        # Otherwise a node that joins later waits for an address that torch never sends.
        separate = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        host = self.start(one, separate)
        until(lambda: listens(port), host)
        lost = self.start(one, separate)
        until(lambda: self.saved(name), host)
        kill(lost)
        replacement = self.start(one, separate)
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
    "two that share the frozen weights": ("sharded", Runs.sharded),
    "two that share them, one killed, restarted by the launcher": ("restarted", Runs.restarted),
    "two nodes, one lost and replaced": ("replaced", Runs.replaced),
    "two, both killed, resumed by one": ("killed", Runs.killed),
}


def hashes(folder: Path, model: Sequence[str], ways: Sequence[str] = tuple(WAYS)) -> dict[str, str]:
    """Hash of the adapter that each way of running produces."""
    runs = Runs(folder, model)
    found = {}
    for way in ways:
        name, run = WAYS[way]
        run(runs, name)
        found[way] = adapter(folder / name)
    return found


def small_model(folder: Path) -> list[str]:
    """Save a small random Wan in a folder, and return the arguments that select it."""
    from tests.small_wan import OPTIONS, save_small_wan

    checkpoint = save_small_wan(folder)
    return ["--backbone=wan", f"--set=backbone.model={checkpoint}", "--device=cpu",
            *(f"--set=backbone.{name}={value}" for name, value in OPTIONS.items())]  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = hashes(Path(folder), small_model(Path(folder) / "small"))
    for name, digest in found.items():
        print(f"{digest}  {name}")
    if len(set(found.values())) > 1:
        print("The adapters differ: terms of a gradient were rounded differently, or a pair was "
              "drawn twice. Compare the log.jsonl of the runs step by step.")  # fmt: skip
        sys.exit(1)


if __name__ == "__main__":
    main()
