"""A set of 100,000 small pairs: written, opened and read in random order, as files and packed.

    OMP_NUM_THREADS=1 python -m benchmarks.big_set --out benchmarks/results/0.1.0/big_set.json

Each reading is measured in a separate process, in processor seconds; opening also in wall-clock
seconds (`wall s`). `bare` reads the same files completely with the standard library, in the same
order: a lower bound for any reader. All files are in the page cache, as far as they fit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SHAPE = (4, 8, 8, 8)
PROMPTS = 1000
READS = 20_000  # in random order, after a first pass over all pairs


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = call()
    return round(time.process_time() - started, 3), result


def make(folder: Path, count: int, synced: bool) -> float:
    """Append pairs and return pairs per second; `synced` writes each to the disk."""
    import torch

    from dpo_video.data.store import Manifest, PairStore
    from dpo_video.types import Pair

    if not synced:
        os.fsync = lambda descriptor: None  # type: ignore[assignment]
    manifest = Manifest(recipe={}, identity="none", latent_shape=SHAPE, fps=8.0)
    store = PairStore.create(folder, manifest)
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randn(PROMPTS, 1, 16, 64, generator=generator)
    started = time.perf_counter()
    for index in range(count):
        first, second = torch.randn(2, *SHAPE, generator=generator)
        preference = torch.full(SHAPE[1:2], float(index % 50 > 0))  # every 50th is a tie
        pair = Pair(
            first=first, second=second, preference=preference, region=torch.ones(1, *SHAPE[1:]),
            prompt=f"a square that moves like number {index % PROMPTS}", source=f"clip {index}",
        )  # fmt: skip
        store.append(pair, {"prompt_embeds": contexts[index % PROMPTS].clone()})
    return round(count / (time.perf_counter() - started), 1)


def opened(folder: Path) -> dict[str, Any]:
    """Time and memory of opening."""
    from dpo_video.data.store import PairStore

    before = resident()
    started = time.perf_counter()
    opening, store = timed(lambda: PairStore(folder))
    elapsed = round(time.perf_counter() - started, 3)
    after = resident()
    deciding, decided = timed(store.decided)
    hashing, _ = timed(lambda: store.digest)
    return {
        "pairs": len(store), "decided": len(decided), "open s": opening,
        "open, wall s": elapsed, "decided s": deciding,
        "digest s": hashing, "MiB before": before,
        "MiB that opening adds": round(after - before, 1),
    }  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    """Every pair once in random order, then some again, which must not use more memory."""
    import torch

    from dpo_video.data.store import PairStore

    store = PairStore(folder)
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(1)).tolist()
    for index in order[:1000]:
        store.batch([index])
    start = resident()
    first, _ = timed(lambda: [store.batch([index]) and None for index in order])
    end = resident()
    again, _ = timed(lambda: [store.batch([index]) and None for index in order[:READS]])
    return {
        "pairs/s": round(min(READS, len(order)) / again), "first pass pairs/s":
        round(len(order) / first), "MiB after 1,000 pairs": start, "MiB after all": end,
    }  # fmt: skip


def bare(folder: Path) -> dict[str, Any]:
    """Read the files of each pair without keeping them."""
    import torch

    from dpo_video.data.store import PairStore

    store = PairStore(folder)
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(1)).tolist()
    files = [
        (folder / f"latents/{store.records[i].key}.safetensors",
         folder / f"contexts/{store.records[i].context}.safetensors")
        for i in order[:READS]
    ]  # fmt: skip
    for _ in range(2):
        seconds, _ = timed(lambda: [path.read_bytes() and None for both in files for path in both])
    return {"pairs/s": round(len(files) / seconds)}


def in_a_process(what: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.big_set", f"--only={what}", f"--folder={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure(folder: Path, count: int) -> dict[str, Any]:
    from dpo_video.data.pack import pack
    from dpo_video.data.store import PairStore

    found: dict[str, Any] = {"count": count, "latents": SHAPE, "prompts": PROMPTS}
    found["append, synced, pairs/s"] = make_in_a_process(folder / "synced", min(1000, count), True)
    found["append, not synced, pairs/s"] = make_in_a_process(folder / "pairs", count, False)
    found["pack s"], _ = timed(lambda: list(pack(PairStore(folder / "pairs"), folder / "packed")))
    for name in ("pairs", "packed"):
        store = folder / name
        found[name] = {
            "files": sum(path.is_file() for path in store.rglob("*")),
            **in_a_process("opened", store), **in_a_process("read", store),
        }  # fmt: skip
    found["bare files"] = in_a_process("bare", folder / "pairs")
    return found


def make_in_a_process(folder: Path, count: int, synced: bool) -> float:
    command = [sys.executable, "-m", "benchmarks.big_set", "--only=make", f"--folder={folder}",
               f"--pairs={count}", *(["--synced"] if synced else [])]  # fmt: skip
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--only", choices=("make", "opened", "read", "bare"), help="run one part alone"
    )
    parser.add_argument("--folder", type=Path, help="folder of the part")
    parser.add_argument(
        "--synced", action="store_true", help="for make: write each pair to the disk"
    )
    given = parser.parse_args(arguments)
    if given.only == "make":
        print(json.dumps(make(given.folder, given.pairs, given.synced)))
    elif given.only:
        print(json.dumps({"opened": opened, "read": read, "bare": bare}[given.only](given.folder)))
    else:
        scratch = Path(tempfile.mkdtemp(prefix="dpo-video-big-"))
        try:
            found = measure(scratch, given.pairs)
        finally:
            shutil.rmtree(scratch)
        text = json.dumps(found, indent=2) + "\n"
        print(text)
        if given.out:
            given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
