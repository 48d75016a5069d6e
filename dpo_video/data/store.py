"""Preference pairs on disk.

    store.json                  what the pairs were made with, checked before they are used
    pairs.jsonl                 one line a pair, appended once its files are safely written
    latents/00000.safetensors   first, second, preference, region
    contexts/HASH.safetensors   an encoded prompt, shared by the pairs that have it
    previews/00000.mp4          first, second and region side by side
    shards.json, shards/        pairs and prompts packed together (see shards.py), if they are

A pair exists when its line does, and counts once all before it exist. A torn last line is a pair
that does not exist yet. Many workers may append at once: whoever writes holds the lock, .lock, so
that every file has one writer, and what a killed one left unfinished is written over.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, final

import torch
from filelock import FileLock
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from dpo_video.data.pair_index import PairIndex, PairRecord, checked, parse
from dpo_video.data.pair_view import PREVIEWS, pair_html, pair_table
from dpo_video.data.shards import INDEX, ShardIndex, Shards
from dpo_video.data.storage import LocalStorage, RemoteStorage, Storage, folder_of, is_url
from dpo_video.errors import StoreError, first_fault
from dpo_video.strategies import VideoModel, weights_of
from dpo_video.support.atomic import append_line, write_bytes, write_tensors, write_text, writing
from dpo_video.types import Context, Pair, PairBatch

BESIDE = Path("runs/remote")
"""Where what belongs to pairs of another machine is kept: labels, banks of predictions."""
PROMPTS_KEPT = 32  # encoded ones, of pairs on another machine


class Manifest(BaseModel):
    """What a store's pairs were made with."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["dpo-video pairs"] = "dpo-video pairs"
    version: Literal[2] = 2
    recipe: dict[str, Any]
    """The resolved tables [backbone], [pairs] and [labeler], the seed and the clips' hash."""
    identity: str
    """The hash of the model's weights."""
    latent_shape: tuple[int, int, int, int]
    """`(c, f, h, w)`."""
    fps: float

    @property
    def key(self) -> str:
        """A hash of everything that the pairs depend on: 10 hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


@final
class PairStore:
    """An open store: a sequence of pairs, and `append`."""

    def __init__(self, where: Path | str) -> None:
        """Open a folder, or the URL of one that fsspec can read.

        Raises:
            StoreError: if there is no store, or a damaged one.
        """
        self._preferences: Mapping[int, Float[Tensor, " f"]] | None = None
        self._storage: Storage = (
            RemoteStorage(str(where)) if is_url(where) else LocalStorage(folder_of(where))
        )
        self.local = not is_url(where)
        """Whether it can be written to."""
        self.where = str(where) if is_url(where) else str(folder_of(where))
        """Its path or URL."""
        try:
            self.manifest = Manifest.model_validate_json(self._storage.read("store.json"))
        except ValidationError as error:
            raise StoreError(
                f"'{self._storage.path('store.json')}' cannot be read ({first_fault(error)}). "
                "Build the pairs again, or update dpo-video if a newer version wrote them."
            ) from error
        except PermissionError as error:
            raise self._forbidden("store.json", error) from error
        except (OSError, ValueError) as error:  # a path may hold what no path can
            raise StoreError(
                f"'{self.where}' is not a pair store: it has no store.json. Name a folder that "
                "`dpo-video build` wrote, or a strategy (see `dpo-video list pairs`)."
            ) from error
        self.folder = folder_of(where) if self.local else BESIDE / self.manifest.key
        """What belongs to the pairs goes here."""
        self._index = PairIndex()
        self._read_to = 0
        self.refresh()
        self.records: Sequence[PairRecord] = self._index.ready
        self._shards = self._open_shards()
        self._read_context: Callable[[str], dict[str, Tensor]] = self._fetch_context
        if not self.local:  # of files that are here, the system remembers what is read often
            self._read_context = lru_cache(maxsize=PROMPTS_KEPT)(self._fetch_context)

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> PairStore:
        """Start a store, or open the one of the same manifest that is there."""
        if not (folder / "store.json").exists():
            with writing(folder):
                for name in ("latents", "contexts", "previews"):
                    (folder / name).mkdir(parents=True, exist_ok=True)
                with locked(folder):
                    if not (folder / "store.json").exists():  # another worker may have been first
                        text = manifest.model_dump_json(indent=2) + "\n"
                        write_text(folder / "store.json", text)
        store = cls(folder)
        if store.manifest.key != manifest.key:
            raise StoreError(
                f"'{folder}' holds pairs of another recipe. Name another folder with --out, "
                "or delete it."
            )
        return store

    def __len__(self) -> int:
        return len(self.records)

    def __contains__(self, index: int) -> bool:
        """Whether the pair was made; it counts once all before it were."""
        return index in self._index

    @property
    def made(self) -> int:
        """How many pairs were made, those included that wait for one before them."""
        return len(self._index)

    def to_dict(self) -> dict[str, Any]:
        """The manifest and the pairs as plain values."""
        return {
            "where": self.where,
            "manifest": self.manifest.model_dump(mode="json"),
            "pairs": [asdict(record) for record in self.records],
        }

    def table(self) -> Table:
        """The first pairs as a table, for a terminal."""
        return pair_table(self.records)

    def _repr_html_(self) -> str:
        previews = [self.preview(index) for index in range(min(PREVIEWS, len(self)))]
        return pair_html(self.where, self.records, previews)

    def preview(self, index: int) -> Path:
        """Where a pair's preview goes."""
        return self.folder / "previews" / f"{index:05d}.mp4"

    def refresh(self) -> None:
        """See what other workers have appended; elsewhere nobody does while it is read."""
        if self._read_to and not self.local:
            return
        try:
            data = self._storage.read("pairs.jsonl", self._read_to)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._forbidden("pairs.jsonl", error) from error
        self._take(data)

    def append(
        self,
        pair: Pair,
        context: Context,
        index: int | None = None,
        preview: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Add a pair, unless another worker has made it by now.

        Args:
            pair: What to write.
            context: Its encoded prompt, with a leading axis of 1.
            index: Which pair it is; the first that is missing if left out.
            preview: Writes its video to the path that it is given.
        """
        if not self.local:
            raise StoreError(
                f"'{self.where}' can be read only. Build pairs in a folder of this machine and "
                "copy them there."
            )
        with writing(self.folder), locked(self.folder):
            self._drop_torn_line()
            index = len(self.records) if index is None else index
            if index in self:
                return
            preview(self.preview(index))
            name = _context_name(pair)
            row = checked(
                index=index,
                prompt=pair.prompt,
                context=name,
                source=pair.source,
                strength=pair.strength,
                region_share=pair.region.mean().item(),
                preference=tuple(pair.preference.tolist()),
            )
            context_file = self.folder / f"{_context_of(row)}.safetensors"
            if _context_of(row) not in self._shards and not context_file.exists():
                write_tensors(context_file, dict(context))
            tensors = {
                "first": pair.first,
                "second": pair.second,
                "preference": pair.preference,
                "region": pair.region,
            }
            write_tensors(self.folder / f"{_latents_of(row)}.safetensors", tensors)
            append_line(self.folder / "pairs.jsonl", row.line())
            self.refresh()

    def batch(self, indices: Sequence[int]) -> PairBatch:
        """Read pairs and stack them, on the CPU. Safe from several threads at once."""
        rows = [self.records[i] for i in indices]
        parts = [self.tensors(row) for row in rows]
        if self._preferences is not None:
            for row, part in zip(rows, parts, strict=True):
                part["preference"] = self.preference(row.index)
        contexts = [self._read_context(row.context) for row in rows]
        shapes = {tuple((name, part[name].shape) for name in sorted(part)) for part in contexts}
        if len(shapes) > 1:
            raise StoreError(
                f"The prompts of the pairs {', '.join(str(row.index) for row in rows)} in "
                f"'{self.where}' are encoded in several ways. Delete it and build the pairs again."
            )
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return PairBatch(
            **stacked,
            strength=torch.tensor([row.strength for row in rows]),
            context={name: torch.cat([c[name] for c in contexts]) for name in contexts[0]},
            keys=[row.key for row in rows],
        )

    def preference(self, index: int) -> Float[Tensor, " f"]:
        """Who is better where in a pair, read without its latents."""
        if self._preferences is None:
            return torch.tensor(self.records[index].preference)
        return self._preferences.get(index, torch.zeros(self.manifest.latent_shape[1]))

    def beginning(self, count: int) -> PairStore:
        """The first pairs alone; all where there are no more."""
        view = copy.copy(self)
        view.records = self.records[:count]
        return view

    @property
    def digest(self) -> str:
        """A hash of the manifest and of every pair's line: 16 hex digits."""
        found = hashlib.sha256(self.manifest.key.encode())
        for row in self.records:
            found.update(row.line())
        return found.hexdigest()[:16]

    @property
    def labels_digest(self) -> str:
        """A hash of the preferences that take the storage of the pairs' own; "" if none do."""
        if self._preferences is None:
            return ""
        said = [[index, self._preferences[index].tolist()] for index in sorted(self._preferences)]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    def relabelled(self, preferences: Mapping[int, Float[Tensor, " f"]]) -> PairStore:
        """The same pairs with other preferences; those that are given none become ties."""
        view = copy.copy(self)
        view._preferences = preferences
        return view

    def decided(self) -> list[int]:
        """The pairs that there is something to learn from; the others are ties throughout."""
        if self._preferences is None:  # of very many, no tensors
            return [row.index for row in self.records if any(row.preference)]
        return [index for index in range(len(self)) if self.preference(index).any()]

    def check_fits(self, model: VideoModel) -> None:
        """A StoreError unless the pairs were made with this very model."""
        if self.manifest.latent_shape != model.latent_shape:
            raise StoreError(
                f"The pairs in '{self.where}' have latents of shape {self.manifest.latent_shape}, "
                f"the backbone's are {model.latent_shape}. Build pairs for this backbone."
            )
        if weights_of(self.manifest.identity) != weights_of(model.identity):
            raise StoreError(
                f"The pairs in '{self.where}' were made with other weights "
                f"({self.manifest.identity}; the backbone's are {model.identity}). Build pairs "
                "for this backbone."
            )

    def tensors(self, row: PairRecord) -> dict[str, Tensor]:
        """What is stored of a pair itself; no labels take the storage of its preference."""
        name = _latents_of(row)
        found = self._load(name)
        shape = self.manifest.latent_shape
        wanted = {"first": shape, "second": shape, "preference": shape[1:2],
                  "region": (1, *shape[1:])}  # fmt: skip
        shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
        if shapes != wanted or not all(part.is_floating_point() for part in found.values()):
            raise self._foreign(name)
        return found

    def context(self, row: PairRecord) -> dict[str, Tensor]:
        """A pair's encoded prompt, with a leading axis of 1."""
        return self._read_context(row.context)

    def fetch_labels(self, name: str) -> None:
        """Copy labels from beside pairs on another machine to beside what belongs to them here."""
        if self.local:
            return
        for file in (f"labels/{name}.json", f"labels/{name}.jsonl"):
            with suppress(FileNotFoundError):
                data = self._storage.read(file)
                with writing(self.folder):
                    (self.folder / "labels").mkdir(parents=True, exist_ok=True)
                    with locked(self.folder):
                        write_bytes(self.folder / file, data)

    def _fetch_context(self, context: str) -> dict[str, Tensor]:
        name = f"contexts/{context}"
        tensors = self._load(name)
        if not tensors or not all(part.ndim and len(part) == 1 for part in tensors.values()):
            raise StoreError(
                f"'{self._path(name)}' holds something else than an encoded prompt. "
                f"{self._next_step()}"
            )
        return tensors

    def _load(self, name: str) -> dict[str, Tensor]:
        with self._reading(name):
            if name in self._shards:
                return self._shards.read(name)
            return self._storage.load(f"{name}.safetensors")

    def _path(self, name: str) -> str:
        shard = self._shards.file(name) if name in self._shards else f"{name}.safetensors"
        return self._storage.path(shard)

    def _foreign(self, name: str) -> StoreError:
        return StoreError(
            f"'{self._path(name)}' holds something else than a pair of this store. "
            f"{self._next_step()}"
        )

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, ValueError) as error:
            raise StoreError(
                f"'{self._path(name)}' cannot be read ({error}). {self._next_step()}"
            ) from error

    def _next_step(self) -> str:
        if self.local:
            return f"Delete '{self.where}' and build the pairs again."
        return "Copy the pairs there again."

    def _open_shards(self) -> Shards:
        try:
            data = self._storage.read(INDEX)
            return Shards(self._storage, ShardIndex.model_validate_json(data))
        except ValidationError as error:
            raise StoreError(
                f"'{self._storage.path(INDEX)}' cannot be read ({first_fault(error)}). Pack the "
                "pairs again, or update dpo-video if a newer version packed them."
            ) from error
        except OSError as error:
            # A bucket that may not be listed forbids what is not there.
            missing = FileNotFoundError if self.local else (FileNotFoundError, PermissionError)
            if not isinstance(error, missing):
                raise self._forbidden(INDEX, error) from error
            return Shards(self._storage, ShardIndex(shards=()))

    def _forbidden(self, name: str, error: OSError) -> StoreError:
        return StoreError(
            f"'{self._storage.path(name)}' cannot be read ({error}). Check that it is a file that "
            "you may read."
        )

    def _take(self, data: bytes) -> None:
        """Take in what follows of pairs.jsonl; not a last line that is not whole."""
        lines = data.split(b"\n")
        torn = lines.pop()
        if lines:
            path, before = self._storage.path("pairs.jsonl"), self._index.lines
            rows = parse(lines, path, before)
            frames = self.manifest.latent_shape[1]
            for number, row in enumerate(rows, start=before + 1):
                if len(row.preference) != frames:
                    raise StoreError(
                        f"Line {number} of '{path}' does not have one preference a latent frame. "
                        "Delete that line and build again: the rest is kept."
                    )
            self._index.add(rows, path)
            self._read_to += len(data) - len(torn)

    def _drop_torn_line(self) -> None:
        """Take in what others wrote, and cut off what one of them could not finish."""
        self.refresh()
        path = self.folder / "pairs.jsonl"
        if path.exists() and path.stat().st_size > self._read_to:
            with path.open("r+b") as file:
                file.truncate(self._read_to)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only one who writes to a folder. A lock ends with its process, however that ends."""
    # Their own interval of 0.05 s would make workers wait for each other longer than they write.
    with FileLock(folder / ".lock").acquire(poll_interval=0.005):
        yield


def _latents_of(row: PairRecord) -> str:
    return f"latents/{row.key}"


def _context_of(row: PairRecord) -> str:
    return f"contexts/{row.context}"


def _context_name(pair: Pair) -> str:
    """Equal for prompts that the model encodes alike; by content for what came encoded."""
    named = pair.prompt.encode() if pair.context is None else save(dict(pair.context))
    return hashlib.sha256(named).hexdigest()[:16]
