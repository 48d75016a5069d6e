"""Preference pairs on disk.

    store.json                  what the pairs were made with, checked before they are used
    pairs.jsonl                 one line a pair, appended once its files are safely written
    latents/00000.safetensors   first, second, preference, region
    contexts/HASH.safetensors   an encoded prompt, shared by the pairs that have it
    previews/00000.mp4          first, second and region side by side

A pair exists when its line does. A torn last line is a pair that does not exist yet.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dpo_video.errors import StoreError
from dpo_video.files import write_tensors, write_text, writing
from dpo_video.strategies import VideoModel, weights_of
from dpo_video.types import Context, Pair, PairBatch


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Manifest(_Record):
    """What a store's pairs were made with."""

    format: Literal["dpo-video pairs"] = "dpo-video pairs"
    version: Literal[1] = 1
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


class PairRow(_Record):
    """One line of pairs.jsonl."""

    index: int
    prompt: str
    context: str = Field(pattern=r"^[0-9a-f]{16}$")
    """The name of the encoded prompt's file: a hash, so that no other folder can be named."""
    source: str
    strength: float
    region_share: float
    """The region's share of the latent elements."""


@final
class PairStore:
    """An open store: a sequence of pairs, and `append`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._preferences: Mapping[int, Float[Tensor, " f"]] | None = None
        if not (folder / "store.json").is_file():
            raise StoreError(
                f"'{folder}' is not a pair store: it has no store.json. Name a folder that "
                "`dpo-video build` wrote, or a strategy (see `dpo-video list pairs`)."
            )
        try:
            self.manifest = Manifest.model_validate_json((folder / "store.json").read_bytes())
        except ValidationError as error:
            raise StoreError(
                f"'{folder / 'store.json'}' cannot be read ({_first(error)}). Build the pairs "
                "again, or update dpo-video if a newer version wrote them."
            ) from error
        self.rows = self._read_rows()

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> PairStore:
        """Start a store, or open the one of the same manifest that is there."""
        if (folder / "store.json").exists():
            store = cls(folder)
            if store.manifest != manifest:
                raise StoreError(
                    f"'{folder}' holds pairs of another recipe. Name another folder with --out, "
                    "or delete it."
                )
            return store
        with writing(folder):
            for name in ("latents", "contexts", "previews"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            write_text(folder / "store.json", manifest.model_dump_json(indent=2) + "\n")
        return cls(folder)

    def __len__(self) -> int:
        return len(self.rows)

    def preview(self, index: int) -> Path:
        """Where a pair's preview goes."""
        return self.folder / "previews" / f"{index:05d}.mp4"

    def append(self, pair: Pair, context: Context) -> PairRow:
        """Add a pair; `context` is its encoded prompt, with a leading axis of 1."""
        index = len(self.rows)
        name = _context_name(pair)
        row = PairRow(
            index=index,
            prompt=pair.prompt,
            context=name,
            source=pair.source,
            strength=pair.strength,
            region_share=pair.region.mean().item(),
        )
        tensors = {
            "first": pair.first,
            "second": pair.second,
            "preference": pair.preference,
            "region": pair.region,
        }
        with writing(self.folder):
            if not self._context_path(name).exists():
                write_tensors(self._context_path(name), dict(context))
            write_tensors(self._latents_path(index), tensors)
            with (self.folder / "pairs.jsonl").open("a", encoding="utf-8") as file:
                file.write(row.model_dump_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.rows.append(row)
        return row

    def batch(self, indices: Sequence[int]) -> PairBatch:
        """Read pairs and stack them, on the CPU."""
        rows = [self.rows[i] for i in indices]
        parts = [self._load_pair(self._latents_path(row.index)) for row in rows]
        if self._preferences is not None:
            for row, part in zip(rows, parts, strict=True):
                part["preference"] = self.preference(row.index)
        contexts = [self._load_context(row) for row in rows]
        shapes = {tuple((name, part[name].shape) for name in sorted(part)) for part in contexts}
        if len(shapes) > 1:
            raise StoreError(
                f"The prompts of the pairs {', '.join(str(row.index) for row in rows)} in "
                f"'{self.folder}' are encoded in several ways. Delete it and build the pairs again."
            )
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return PairBatch(
            **stacked,
            strength=torch.tensor([row.strength for row in rows]),
            context={name: torch.cat([c[name] for c in contexts]) for name in contexts[0]},
            keys=[f"{row.index:05d}" for row in rows],
        )

    def preference(self, index: int) -> Float[Tensor, " f"]:
        """Who is better where in a pair, read without its latents."""
        if self._preferences is not None:
            return self._preferences.get(index, torch.zeros(self.manifest.latent_shape[1]))
        path = self._latents_path(self.rows[index].index)
        with self._reading(path), safe_open(path, framework="pt") as file:
            preference = file.get_tensor("preference")
        if preference.shape != self.manifest.latent_shape[1:2]:
            raise self._foreign(path)
        return preference

    def beginning(self, count: int) -> PairStore:
        """The first pairs alone; all where there are no more."""
        view = copy.copy(self)
        view.rows = self.rows[:count]
        return view

    @property
    def digest(self) -> str:
        """A hash of the manifest and of every pair's line: 16 hex digits."""
        found = hashlib.sha256(self.manifest.key.encode())
        for row in self.rows:
            found.update(row.model_dump_json().encode())
        return found.hexdigest()[:16]

    @property
    def labels_digest(self) -> str:
        """A hash of the preferences that take the place of the pairs' own; "" if none do."""
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
        return [index for index in range(len(self)) if self.preference(index).any()]

    def check_fits(self, model: VideoModel) -> None:
        """A StoreError unless the pairs were made with this very model."""
        if self.manifest.latent_shape != model.latent_shape:
            raise StoreError(
                f"The pairs in '{self.folder}' have latents of shape {self.manifest.latent_shape}, "
                f"the backbone's are {model.latent_shape}. Build pairs for this backbone."
            )
        if weights_of(self.manifest.identity) != weights_of(model.identity):
            raise StoreError(
                f"The pairs in '{self.folder}' were made with other weights "
                f"({self.manifest.identity}; the backbone's are {model.identity}). Build pairs "
                "for this backbone."
            )

    def _latents_path(self, index: int) -> Path:
        return self.folder / "latents" / f"{index:05d}.safetensors"

    def _context_path(self, name: str) -> Path:
        return self.folder / "contexts" / f"{name}.safetensors"

    def _load_pair(self, path: Path) -> dict[str, Tensor]:
        tensors = self._load(path)
        shape = self.manifest.latent_shape
        wanted = {"first": shape, "second": shape, "preference": shape[1:2],
                  "region": (1, *shape[1:])}  # fmt: skip
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != wanted or not all(part.is_floating_point() for part in tensors.values()):
            raise self._foreign(path)
        return tensors

    def _foreign(self, path: Path) -> StoreError:
        return StoreError(
            f"'{path}' holds something else than a pair of this store. Delete '{self.folder}' and "
            "build the pairs again."
        )

    def _load_context(self, row: PairRow) -> dict[str, Tensor]:
        path = self._context_path(row.context)
        tensors = self._load(path)
        if not tensors or not all(part.ndim and len(part) == 1 for part in tensors.values()):
            raise StoreError(
                f"'{path}' holds something else than an encoded prompt. Delete '{self.folder}' "
                "and build the pairs again."
            )
        return tensors

    def _load(self, path: Path) -> dict[str, Tensor]:
        with self._reading(path):
            return load_file(path)

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"'{path}' cannot be read ({error}). Delete '{self.folder}' and build the pairs "
                "again."
            ) from error

    def _read_rows(self) -> list[PairRow]:
        path = self.folder / "pairs.jsonl"
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")
        if torn := lines.pop():
            # A write that was cut off. Its pair will be made again.
            with writing(self.folder), path.open("r+b") as file:
                file.truncate(path.stat().st_size - len(torn))
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = PairRow.model_validate_json(line)
            except ValidationError as error:
                raise StoreError(
                    f"Line {number} of '{path}' cannot be read ({_first(error)}). Delete that line "
                    "and all after it, and build again: the rest is kept."
                ) from error
            if row.index != number - 1:
                raise StoreError(
                    f"Line {number} of '{path}' has index {row.index}, not {number - 1}. Delete "
                    "that line and all after it, and build again: the rest is kept."
                )
            rows.append(row)
        return rows


def _context_name(pair: Pair) -> str:
    """Equal for prompts that the model encodes alike; by content for what came encoded."""
    named = pair.prompt.encode() if pair.context is None else save(dict(pair.context))
    return hashlib.sha256(named).hexdigest()[:16]


def _first(error: ValidationError) -> str:
    detail = error.errors()[0]
    place = ".".join(str(part) for part in detail["loc"])
    return f"{place}: {detail['msg']}" if place else detail["msg"]
