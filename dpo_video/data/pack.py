"""A store's pairs into few large files: a copy in another folder, the same set to any reader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpo_video.data.shards import INDEX, Shard, ShardIndex
from dpo_video.data.store import PairStore, locked
from dpo_video.errors import StoreError
from dpo_video.support.atomic import write_bytes, write_tensors, write_text, writing

SIZE = 256 << 20  # bytes of a shard, which is also what packing needs a few times of memory


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """One shard was written, or found written."""

    done: int
    """Pairs and prompts in shards by now."""
    total: int
    file: Path


def pack(store: PairStore, folder: Path, size: int = SIZE) -> Iterator[PackReport]:
    """Copy a store into shards, with its labels and without its previews.

    The copy's digest is the store's, so that a run on the one can be resumed on the other. It is
    a store once all of it is there; shards that an interrupted call wrote are kept.

    Args:
        store: Of this machine or another.
        folder: Where the copy goes.
        size: Bytes of a shard; one row makes a shard, however large.

    Raises:
        StoreError: if something else is in the folder.
    """
    digest = store.digest
    if (folder / "store.json").exists():
        there = PairStore(folder)
        if there.digest != digest or not (folder / INDEX).exists():
            raise StoreError(f"'{folder}' holds pairs already. Name another folder.")
        return
    pairs = {f"latents/{row.key}": row for row in store.records}
    prompts = {f"contexts/{row.context}": row for row in store.records}
    total = len(pairs) + len(prompts)
    shards: list[Shard] = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            for kind, rows, read in (
                ("pairs", pairs, store.tensors),
                ("prompts", prompts, store.context),
            ):
                names, number = list(rows), 0
                while names:
                    path = folder / "shards" / f"{kind}-{number:05d}.safetensors"
                    count = _written(path, digest) or _write(
                        path, (read(rows[name]) for name in names), size, digest
                    )
                    file = path.relative_to(folder).as_posix()
                    shards.append(Shard(file=file, holds=tuple(names[:count])))
                    names, number = names[count:], number + 1
                    done = sum(len(shard.holds) for shard in shards)
                    yield PackReport(done=done, total=total, file=path)
            for path in sorted((store.folder / "labels").glob("*.json*")):
                write_bytes(folder / "labels" / path.name, path.read_bytes())
            lines = b"".join(row.line() + b"\n" for row in store.records)
            write_bytes(folder / "pairs.jsonl", lines)
            write_text(folder / INDEX, ShardIndex(shards=tuple(shards)).model_dump_json() + "\n")
            write_text(folder / "store.json", store.manifest.model_dump_json(indent=2) + "\n")


def _written(path: Path, digest: str) -> int:
    """The rows of a shard that an earlier call has written of this very store; 0 if none has."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("pairs") == digest:
                return int(file.get_slice(next(iter(file.keys()))).get_shape()[0])
    except (OSError, SafetensorError):
        pass
    return 0


def _write(path: Path, rows: Iterator[dict[str, Tensor]], size: int, digest: str) -> int:
    """Write rows to a shard until it is full or they change their shape; how many."""
    held: list[dict[str, Tensor]] = []
    for row in rows:
        if held and _layout(row) != _layout(held[0]):
            break
        held.append(row)
        if len(held) * sum(tensor.nbytes for tensor in row.values()) >= size:
            break
    stacked = {name: torch.stack([row[name] for row in held]) for name in held[0]}
    write_tensors(path, stacked, metadata={"pairs": digest})
    return len(held)


def _layout(row: dict[str, Tensor]) -> list[tuple[str, torch.dtype, torch.Size]]:
    return sorted((name, tensor.dtype, tensor.shape) for name, tensor in row.items())
