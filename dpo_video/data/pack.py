"""Pack a store into a few large files: a copy in another folder that reads as the same set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpo_video.data.shards import INDEX, Shard, ShardIndex
from dpo_video.data.store import NEGATIVE, PairStore
from dpo_video.errors import StoreError
from dpo_video.registry import local
from dpo_video.support.atomic import write_bytes, write_tensors, write_text, writing
from dpo_video.support.claims import claim

SIZE = 256 << 20  # bytes of a shard; packing needs a few times this in memory


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """Progress: a shard was written, or an earlier call had written it."""

    done: int
    """Pairs and prompts in shards so far."""
    total: int


def pack(store: PairStore, folder: Path, size: int = SIZE) -> Iterator[PackReport]:
    """Copy a store into shards, with its labels and without its previews.

    The copy has the store's digest, so a run on one can be resumed on the other. An interrupted
    call leaves its shards, which the next call keeps; store.json is written last.

    Args:
        store: A local or remote store.
        folder: Folder of the copy.
        size: Size of a shard, bytes; a shard has at least one row.

    Raises:
        StoreError: if the folder holds other pairs.
        BusyError: if another process is writing it.
    """
    digest = store.digest
    with claim(folder, instead="name another folder"):
        if (folder / "store.json").exists():
            present = PairStore(folder)
            if present.digest != digest or not (folder / INDEX).exists():
                raise StoreError(f"'{folder}' holds pairs already. Name another folder.")
            return
        with writing(folder):
            yield from _pack(store, folder, size, digest)


def _pack(store: PairStore, folder: Path, size: int, digest: str) -> Iterator[PackReport]:
    pairs = {record.latents_file: record for record in store.records}
    prompts = {record.context_file: record for record in store.records}
    total = len(pairs) + len(prompts)
    shards: list[Shard] = []
    for kind, records, read in (
        ("pairs", pairs, store.tensors),
        ("prompts", prompts, store.context),
    ):
        names, number = list(records), 0
        while names:
            path = folder / "shards" / f"{kind}-{number:05d}.safetensors"
            count = _written(path, digest) or _write(
                path, (read(records[name]) for name in names), size, digest
            )
            file = path.relative_to(folder).as_posix()
            shards.append(Shard(file=file, holds=tuple(names[:count])))
            names, number = names[count:], number + 1
            done = sum(len(shard.holds) for shard in shards)
            yield PackReport(done=done, total=total)
    if (negative := store.negative_context()) is not None:
        write_tensors(folder / NEGATIVE, negative)
    for path in sorted((store.folder / "labels").glob("*.json*")):
        write_bytes(folder / "labels" / path.name, path.read_bytes())
    for path in sorted((store.folder / local.FOLDER).glob("*.py")):
        write_bytes(folder / local.FOLDER / path.name, path.read_bytes())
    lines = b"".join(record.line() + b"\n" for record in store.records)
    write_bytes(folder / "pairs.jsonl", lines)
    write_text(folder / INDEX, ShardIndex(shards=tuple(shards)).model_dump_json() + "\n")
    write_text(folder / "store.json", store.manifest.model_dump_json(indent=2) + "\n")


def _written(path: Path, digest: str) -> int:
    """Number of rows of a shard that an earlier call wrote of this store; 0 if there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("pairs") == digest:
                return int(file.get_slice(next(iter(file.keys()))).get_shape()[0])
    except (OSError, SafetensorError):
        pass
    return 0


def _write(path: Path, rows: Iterator[dict[str, Tensor]], size: int, digest: str) -> int:
    """Write rows to a shard until it is full or their shape changes; returns their number."""
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
