"""Preference pairs on disk.

    store.json                  the manifest, checked before the pairs are used
    pairs.jsonl                 one line per pair, appended once its files are on the disk
    latents/00000.safetensors   first, second, preference, region; of a group also between
    contexts/HASH.safetensors   an encoded prompt, shared by its pairs
    negative.safetensors        the model's encoded negative prompt, for validation videos
    previews/00000.mp4          first video, second video and region side by side
    shards.json, shards/        packed pairs and prompts, if any (see shards.py)

A pair exists once its line does, and counts once all pairs before it exist. A torn last line is
ignored. Several workers may append at once: a writer holds the lock .lock, and overwrites what a
killed worker left unfinished.
"""

from __future__ import annotations

import copy
import hashlib
import json
import reprlib
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
from dpo_video.data.storage import LocalStorage, RemoteStorage, Storage
from dpo_video.errors import StoreError, first_fault
from dpo_video.paths import check_name
from dpo_video.strategies import VideoModel, weights_of
from dpo_video.support.atomic import append_line, write_bytes, write_tensors, write_text, writing
from dpo_video.support.hashing import tensors_digest
from dpo_video.support.urls import folder_of, is_url, without_credentials
from dpo_video.text import one_line
from dpo_video.types import Context, Pair, PairBatch

REMOTE_FILES = Path("runs/remote")
"""Local folder of what belongs to remote pairs: labels and reference caches."""
NEGATIVE = "negative.safetensors"
PARTS = ("first", "second", "preference", "region")
PROMPTS_KEPT = 32  # encoded prompts of remote pairs in memory


class Manifest(BaseModel):
    """Everything that a store's pairs depend on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["dpo-video pairs"] = "dpo-video pairs"
    version: Literal[2] = 2
    recipe: dict[str, Any]
    """The resolved tables [backbone], [pairs] and [labeler], the seed and the clips' hash."""
    identity: str
    """Hash of the model's weights."""
    latent_shape: tuple[int, int, int, int]
    """`(c, f, h, w)`."""
    fps: float
    versions: dict[str, str] = {}
    """Versions of the packages that built the pairs; of a plugin with a hash of its source."""

    @property
    def key(self) -> str:
        """A hash of the manifest: 10 hex digits."""
        return _digest(self.model_dump(mode="json")) if self.versions else self.recipe_key

    @property
    def recipe_key(self) -> str:
        """The same without the versions."""
        return _digest(self.model_dump(mode="json", exclude={"versions"}))


@final
class PairStore:
    """An open store: a sequence of pairs, with `append`."""

    def __init__(self, where: Path | str) -> None:
        """Open a folder, or a URL that fsspec can read.

        Raises:
            StoreError: if there is no store, or it is damaged.
        """
        self._preferences: Mapping[int, Float[Tensor, " f"]] | None = None
        self._storage: Storage = (
            RemoteStorage(str(where)) if is_url(where) else LocalStorage(folder_of(where))
        )
        self.local = not is_url(where)
        """Whether pairs can be appended."""
        self.address = str(where) if is_url(where) else str(folder_of(where))
        """Its path or URL, which opens it again."""
        self.where = without_credentials(self.address)
        """Its path or URL as it may be stored and shown."""
        try:
            self.manifest = Manifest.model_validate_json(self._storage.read("store.json"))
        except ValidationError as error:
            raise StoreError(
                f"'{self._storage.path('store.json')}' cannot be read ({first_fault(error)}). "
                "Build the pairs again, or update dpo-video if a newer version wrote them."
            ) from error
        except PermissionError as error:
            raise self._forbidden("store.json", error) from error
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            raise StoreError(
                f"'{self.where}' is not a pair store: it has no store.json. Name a folder that "
                "`dpo-video build` wrote, or a strategy (see `dpo-video list pairs`)."
            ) from error
        self.folder = folder_of(where) if self.local else REMOTE_FILES / self.manifest.key
        """Local folder of labels, reference caches and new pairs."""
        self._index = PairIndex()
        self._read_bytes = 0
        self.refresh()
        self.records: Sequence[PairRecord] = self._index.ready
        self._shards = self._open_shards()
        self._read_context: Callable[[str, str], dict[str, Tensor]] = self._fetch_context
        if not self.local:  # the system caches local files
            self._read_context = lru_cache(maxsize=PROMPTS_KEPT)(self._fetch_context)

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> PairStore:
        """Create a store, or open the existing one of the same manifest.

        A store without any pair, such as that of a build which failed, may change its manifest.
        """
        path = folder / "store.json"
        if not path.exists() or cls(folder).manifest.key != manifest.key:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                with locked(folder):
                    if not path.exists() or not cls(folder).made:
                        for name in ("latents", "contexts", "previews"):
                            (folder / name).mkdir(exist_ok=True)
                        write_text(path, manifest.model_dump_json(indent=2) + "\n")
        store = cls(folder)
        if store.manifest.key != manifest.key:
            before, now = ({**m.recipe, **m.versions} for m in (store.manifest, manifest))
            changed = "; ".join(_changes(before, now)[:3])
            raise StoreError(
                f"'{folder}' holds pairs that were built with other options"
                f"{f' ({changed})' if changed else ''}. Name another folder with --out, or delete "
                "it."
            )
        return store

    def __len__(self) -> int:
        return len(self.records)

    def __contains__(self, index: int) -> bool:
        """Whether the pair exists, even if one before it is still missing."""
        return index in self._index

    @property
    def made(self) -> int:
        """Number of existing pairs, including those after a missing one."""
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
        """Path of a pair's preview."""
        return self.folder / "previews" / f"{index:05d}.mp4"

    def refresh(self) -> None:
        """Read what other workers have appended; a remote store is read once."""
        if self._read_bytes and not self.local:
            return
        try:
            data = self._storage.read("pairs.jsonl", self._read_bytes)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._forbidden("pairs.jsonl", error) from error
        self._add(data)

    def append(
        self,
        pair: Pair,
        context: Context,
        index: int | None = None,
        preview: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Add a pair, unless another worker has added it.

        Args:
            pair: The pair.
            context: Its encoded prompt, with a leading axis of 1.
            index: Its index; by default the first missing one.
            preview: Writes its preview to a path.
        """
        if not self.local:
            raise StoreError(
                f"'{self.where}' is read-only. Build pairs in a local folder and copy them there."
            )
        with writing(self.folder), locked(self.folder):
            self._drop_torn_line()
            index = len(self.records) if index is None else index
            if index in self:
                return
            preview(self.preview(index))
            tensors = {name: vars(pair)[name] for name in PARTS}
            if pair.between is not None:
                tensors["between"] = pair.between
            name = _context_name(pair)
            encoded = f"contexts/{name}"
            context_file = self.folder / f"{encoded}.safetensors"
            if encoded in self._shards or context_file.exists():
                context = self._load(encoded)  # another machine's may differ in the last bits
            else:
                write_tensors(context_file, dict(context))
            record = checked(
                index=index,
                prompt=pair.prompt,
                context=name,
                source=pair.source,
                strength=pair.strength,
                region_share=pair.region.mean().item(),
                preference=tuple(pair.preference.tolist()),
                latents_hash=_hash(tensors),
                context_hash=_hash(context),
                weight=pair.weight,
                ranks=tuple(pair.ranks),
            )
            write_tensors(self.folder / f"{record.latents_file}.safetensors", tensors)
            append_line(self.folder / "pairs.jsonl", record.line())
            self.refresh()

    def keep_negative(self, context: Context | None) -> None:
        """Keep the model's encoded negative prompt, so that sampling needs no text encoder."""
        path = self.folder / NEGATIVE
        if context is not None and not path.exists():
            with writing(self.folder):
                write_tensors(path, dict(context))

    def negative_context(self) -> dict[str, Tensor] | None:
        """The encoded negative prompt of the model; None if it was not kept."""
        try:
            return self._storage.load(NEGATIVE)
        except (OSError, SafetensorError, ValueError):
            return None

    @property
    def negative_prompt(self) -> str:
        """The negative prompt of `negative_context`."""
        backbone = self.manifest.recipe.get("backbone")
        found = backbone.get("negative_prompt", "") if isinstance(backbone, Mapping) else ""
        return str(found)

    def encoded(self, prompt: str) -> dict[str, Tensor] | None:
        """An encoded prompt with a leading axis of 1; None if no pair has it."""
        name = _name_of(prompt)
        for record in self.records:
            if record.context == name:
                return self.context(record)
        return None

    def batch(self, indices: Sequence[int]) -> PairBatch:
        """Read pairs and stack them on the CPU. Safe from several threads at once."""
        records = [self.records[i] for i in indices]
        parts = [self.tensors(record) for record in records]
        if self._preferences is not None:
            for record, part in zip(records, parts, strict=True):
                part["preference"] = self.preference(record.index)
        contexts = [self.context(record) for record in records]
        shapes = {tuple((name, part[name].shape) for name in sorted(part)) for part in contexts}
        if len(shapes) > 1:
            raise StoreError(
                f"The prompts of the pairs {', '.join(str(record.index) for record in records)} in "
                f"'{self.where}' are encoded in several ways. Delete it and build the pairs again."
            )
        if len({len(record.ranks) for record in records}) > 1:
            raise StoreError(
                f"'{self.where}' holds groups of several sizes, which cannot be stacked. Set "
                "train.batch_size=1."
            )
        ranks = [record.ranks for record in records]
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return PairBatch(
            **stacked,
            strength=torch.tensor([record.strength for record in records]),
            context={name: torch.cat([c[name] for c in contexts]) for name in contexts[0]},
            keys=[record.key for record in records],
            ranks=torch.tensor(ranks).float() if ranks[0] else None,
        )

    def preference(self, index: int) -> Float[Tensor, " f"]:
        """Preference of a pair per latent frame, read without its latents."""
        if self._preferences is None:
            return torch.tensor(self.records[index].preference)
        return self._preferences.get(index, torch.zeros(self.manifest.latent_shape[1]))

    def beginning(self, count: int) -> PairStore:
        """A view of the first `count` pairs."""
        view = copy.copy(self)
        view.records = self.records[:count]
        return view

    @property
    def digest(self) -> str:
        """A hash of the manifest and of every pair's line: 16 hex digits."""
        found = hashlib.sha256(self.manifest.key.encode())
        for record in self.records:
            found.update(record.line())
        return found.hexdigest()[:16]

    @property
    def labels_digest(self) -> str:
        """A hash of the preferences of `relabelled`; "" without them."""
        if self._preferences is None:
            return ""
        values = [[index, self._preferences[index].tolist()] for index in sorted(self._preferences)]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    def relabelled(self, preferences: Mapping[int, Float[Tensor, " f"]]) -> PairStore:
        """A view with other preferences; pairs without one become ties."""
        view = copy.copy(self)
        view._preferences = preferences
        return view

    @property
    def has_regions(self) -> bool:
        """Whether the two videos of any pair are equal outside a region."""
        return any(record.region_share != 1 for record in self.records)

    def unlisted(self) -> int:
        """Number of files of latents that no line of pairs.jsonl names; 0 for packed pairs."""
        if not self.local:
            return 0
        named = {Path(record.latents_file).name for record in self.records}
        return sum(p.stem not in named for p in self.folder.glob("latents/*.safetensors"))

    @property
    def has_groups(self) -> bool:
        """Whether any pair has samples between its two videos."""
        return any(record.ranks for record in self.records)

    def decided(self) -> list[int]:
        """Indices of the pairs that have a preference in any frame."""
        if self._preferences is None:  # no tensors, because there may be very many
            return [record.index for record in self.records if any(record.preference)]
        return [index for index in range(len(self)) if self.preference(index).any()]

    def check_fits(self, model: VideoModel) -> None:
        """A StoreError unless the pairs were made with this model's weights and shape."""
        if self.manifest.latent_shape != model.latent_shape:
            raise StoreError(
                f"The pairs in '{self.where}' have latents of shape {self.manifest.latent_shape}; "
                f"the backbone's are {model.latent_shape}. {self._for_this_backbone}"
            )
        if weights_of(self.manifest.identity) != weights_of(model.identity):
            raise StoreError(
                f"The pairs in '{self.where}' were made with other weights "
                f"({self.manifest.identity}; the backbone's are {model.identity}). "
                f"{self._for_this_backbone}"
            )

    @property
    def _for_this_backbone(self) -> str:
        made_with = self.manifest.recipe.get("backbone")
        if not isinstance(made_with, Mapping):
            return "Build pairs for this backbone."
        model = f" with the model {made_with['model']}" if "model" in made_with else ""
        return (
            f"They were made with {made_with.get('name')}{model}. Leave out --backbone and its "
            "options, so that those of the pairs are taken, or build pairs for this backbone."
        )

    def tensors(self, record: PairRecord) -> dict[str, Tensor]:
        """The stored tensors of a pair, with its own preference."""
        name = record.latents_file
        found = self._load(name)
        shape = self.manifest.latent_shape
        expected = {"first": shape, "second": shape, "preference": shape[1:2],
                  "region": (1, *shape[1:])}  # fmt: skip
        if record.ranks:
            expected["between"] = (len(record.ranks) - 2, *shape)
        shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
        if shapes != expected or not all(part.is_floating_point() for part in found.values()):
            raise self._foreign(name, "a pair of this store")
        if record.latents_hash not in ("", _hash(found)):
            raise self._foreign(name, "what was written")
        return found

    def context(self, record: PairRecord) -> dict[str, Tensor]:
        """A pair's encoded prompt, with a leading axis of 1."""
        return self._read_context(record.context, record.context_hash)

    def forget_missing(self) -> int:
        """Forget the pairs whose files are gone, to build them again; return how many.

        Their labels are kept. Only pairs of a local folder that are not packed can be built again.
        """
        if not (missing := self._missing()):
            return 0
        with writing(self.folder), locked(self.folder):
            self.refresh()
            missing = self._missing()
            kept = [record.line() + b"\n" for record in self._index if record.index not in missing]
            write_bytes(self.folder / "pairs.jsonl", b"".join(kept))
            self._index, self._read_bytes = PairIndex(), 0
            self.refresh()
            self.records = self._index.ready
        return len(missing)

    def is_complete(self) -> bool:
        """Whether the files of all pairs exist."""
        return not self._missing()

    def _missing(self) -> set[int]:
        if not self.local:
            return set()
        present = {
            f"{folder}/{path.stem}"
            for folder in ("latents", "contexts")
            for path in (self.folder / folder).glob("*.safetensors")
        }
        return {
            record.index
            for record in self._index
            if any(
                name not in present and name not in self._shards
                for name in (record.latents_file, record.context_file)
            )
        }

    def fetch_labels(self, name: str) -> None:
        """Copy the labels of a remote store to its local folder.

        Raises:
            UserError: if the name cannot name labels, such as one with a slash.
        """
        if self.local:
            return
        check_name(name, "labels")
        for file in (f"labels/{name}.json", f"labels/{name}.jsonl"):
            with suppress(FileNotFoundError):
                data = self._storage.read(file)
                with writing(self.folder):
                    (self.folder / "labels").mkdir(parents=True, exist_ok=True)
                    with locked(self.folder):
                        write_bytes(self.folder / file, data)

    def _fetch_context(self, context: str, expected: str) -> dict[str, Tensor]:
        name = f"contexts/{context}"
        tensors = self._load(name)
        if not tensors or not all(part.ndim and len(part) == 1 for part in tensors.values()):
            raise self._foreign(name, "an encoded prompt")
        if expected not in ("", _hash(tensors)):
            raise self._foreign(name, "what was written")
        return tensors

    def _load(self, name: str) -> dict[str, Tensor]:
        try:
            if name in self._shards:
                return self._shards.read(name)
            return self._storage.load(f"{name}.safetensors")
        except (OSError, SafetensorError, ValueError) as error:
            raise StoreError(
                f"'{self._path(name)}' cannot be read ({error}). {self._next_step(name)}"
            ) from error

    def _path(self, name: str) -> str:
        shard = self._shards.file(name) if name in self._shards else f"{name}.safetensors"
        return self._storage.path(shard)

    def _foreign(self, name: str, expected: str) -> StoreError:
        return StoreError(f"'{self._path(name)}' does not hold {expected}. {self._next_step(name)}")

    def _next_step(self, name: str) -> str:
        if not self.local:
            return "Copy the pairs there again."
        if name in self._shards:
            return "Pack the pairs again, or copy that file again."
        return (
            "Delete that file, if it exists, and run the build of these pairs again: it builds "
            "what is missing, and keeps the rest and the labels."
        )

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
            # A bucket that may not be listed answers a missing file with 'forbidden'.
            missing = FileNotFoundError if self.local else (FileNotFoundError, PermissionError)
            if not isinstance(error, missing):
                raise self._forbidden(INDEX, error) from error
            return Shards(self._storage, ShardIndex(shards=()))

    def _forbidden(self, name: str, error: OSError) -> StoreError:
        return StoreError(
            f"'{self._storage.path(name)}' cannot be read ({error}). Check that it is a file that "
            "you may read."
        )

    def _add(self, data: bytes) -> None:
        """Add the following lines of pairs.jsonl, without a torn last one."""
        lines = data.split(b"\n")
        torn = lines.pop()
        if lines:
            path, before = self._storage.path("pairs.jsonl"), self._index.lines
            records = parse(lines, path, before)
            frames = self.manifest.latent_shape[1]
            for number, record in enumerate(records, start=before + 1):
                if len(record.preference) != frames:
                    raise StoreError(
                        f"Line {number} of '{path}' needs one preference per latent frame. "
                        "Delete that line and build again: the rest is kept."
                    )
            self._index.add(records, path)
            self._read_bytes += len(data) - len(torn)

    def _drop_torn_line(self) -> None:
        """Read what other workers appended, and remove a torn last line."""
        self.refresh()
        path = self.folder / "pairs.jsonl"
        if path.exists() and path.stat().st_size > self._read_bytes:
            with path.open("r+b") as file:
                file.truncate(self._read_bytes)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's write lock. The system releases it if the process is killed."""
    # The default interval of 0.05 s would be longer than most writes.
    with FileLock(folder / ".lock").acquire(poll_interval=0.005):
        yield


def _context_name(pair: Pair) -> str:
    """A hash of the prompt's text, or of the tensors if the prompt came encoded."""
    if pair.context is None:
        return _name_of(pair.prompt)
    return hashlib.sha256(save(dict(pair.context))).hexdigest()[:16]


def _name_of(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _hash(tensors: Mapping[str, Tensor]) -> str:
    return tensors_digest(tensors)[:16]


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> list[str]:
    """What differs between two recipes, by the options' paths."""
    found = []
    for name in sorted({*before, *after}):
        old, new, here = before.get(name), after.get(name), f"{path}{name}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _changes(old, new, f"{here}.")
        elif old != new:
            found.append(f"{here}: {_brief(old)} before, {_brief(new)} now")
    return found


def _brief(value: object) -> str:
    return "not set" if value is None else one_line(reprlib.repr(value))
