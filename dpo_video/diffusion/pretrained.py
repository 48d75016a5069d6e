"""Checkpoints in diffusers' layout: found, loaded part by part, hashed, and freed again."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import torch
from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn
from transformers import PreTrainedModel

from dpo_video.diffusion.known_models import find_model
from dpo_video.errors import UserError
from dpo_video.support.hashing import file_digest
from dpo_video.types import Placement

Loaded = TypeVar("Loaded")
Network = TypeVar("Network", bound=nn.Module)

_AUTHORS = {"_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DESCRIBING = ("*.json", "*.txt", "*.model")  # configurations, vocabularies, indices of shards
_SAFE, _PICKLED = "*.safetensors", "*.bin"
_VARIANTS = ("*.fp16.*", "*.bf16.*", "*.fp16-*", "*.bf16-*", "*non_ema*")  # other copies
_BLOB = re.compile(r"[0-9a-f]{64}")


@final
@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where the parts of a model are: a folder, or a repository of the hub.

    A part is a subfolder such as "vae"; "" is the checkpoint itself, where it is a single network.
    Of the hub's files only those of the parts asked for are downloaded. HF_HUB_OFFLINE=1 keeps to
    what is in the cache.
    """

    source: str
    """Folder or hub id. A known model's name is taken for its id."""
    revision: str | None = None
    """Branch, tag or commit on the hub; its main branch if None."""
    option: str = "backbone.model"
    """The option that names the source, for error messages."""
    placement: Placement = field(default_factory=Placement)
    """With `on_meta`, networks are built on the meta device in the precision that they would be
    loaded in, tokenizers and text encoders are None, and nothing but JSON is read: for known models
    that of the package."""

    def __post_init__(self) -> None:
        known = find_model(self.source)
        if known and not self._local.is_dir() and self.source.lower() == known.name:
            object.__setattr__(self, "source", known.hub[0])

    @property
    def _local(self) -> Path:
        return Path(self.source).expanduser()

    def folder(self, part: str = "") -> Path:
        """The part's folder, on the disk when this returns; a UserError if there is none."""
        known = find_model(self.source) if self.placement.on_meta else None
        if self._local.is_dir():
            root = self._local
        else:
            root = known.folder if known else self._download(part)
        folder = root / part
        if not folder.is_dir():
            raise self._missing(part, f"it has no folder '{part}'")
        return folder

    def config(self, part: str = "", file: str = "config.json") -> dict[str, Any]:
        """What a part says of itself, without loading it."""
        path = self.folder(part) / file
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise self._missing(part, f"it has no '{Path(part) / file}'") from error
        except (OSError, ValueError) as error:
            raise self._missing(part, f"'{Path(part) / file}' cannot be read ({error})") from error
        return config

    def full_config(self, network: type[Any], part: str = "") -> Mapping[str, Any]:
        """A part's configuration with the defaults of its diffusers class filled in."""
        with torch.device("meta"):
            full: Mapping[str, Any] = network.from_config(self.config(part)).config
        return full

    def load(self, load: Callable[..., Loaded], part: str = "", **options: Any) -> Loaded:
        """Call a `from_pretrained` on the part's folder.

        Raises:
            UserError: if that fails, or the network would have weights that no file gives, which
                libraries draw at random and only warn of.
        """
        if self.placement.on_meta and not _is_scheduler(load):
            outline: Loaded = self._outline(load, part, **options)
            return outline
        folder = self.folder(part)
        if _needs_sentencepiece(folder):
            raise UserError(
                f"The {part} of '{self.source}' is a SentencePiece model, which needs a package "
                "more to be read. Install it: pip install sentencepiece"
            )
        try:
            with warnings.catch_warnings():
                # diffusers gives the hub's client an argument that it has no use for any more.
                warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
                if not _is_network(load):
                    return load(str(folder), **options)
                told: Any = load(str(folder), output_loading_info=True, **options)
        except (OSError, ValueError, ImportError) as error:
            raise self._missing(part, str(error).strip().splitlines()[0].rstrip(".")) from error
        loaded: Loaded = told[0]
        if absent := sorted(told[1]["missing_keys"]):
            raise self._missing(
                part,
                f"its files lack {len(absent)} of its weights, '{absent[0]}' first, so they are "
                "damaged or were written for another version of the library",
            )
        return loaded

    def _outline(self, load: Any, part: str, **options: Any) -> Any:
        network = load.__self__
        if not hasattr(network, "from_config"):
            return None  # a tokenizer, a text encoder
        with torch.device("meta"):
            made = network.from_config(dict(self.config(part)))
        # As from_pretrained: what a class keeps in fp32 stays, and with it all that is no weight.
        kept = network._keep_in_fp32_modules
        for name, tensor in (*made.named_parameters(), *(made.named_buffers() if not kept else ())):
            if tensor.is_floating_point() and not {*(kept or ())} & {*name.split(".")}:
                tensor.data = tensor.data.to(options.get("torch_dtype", torch.float32))
        return made

    def digest(self, *parts: str) -> str:
        """SHA-256 over the parts' configurations and files of weights; none in an outline.

        A network with other settings predicts otherwise from the same weights, and so does one
        whose scheduler counts on another prediction. What only says who wrote the file is left out.
        """
        if self.placement.on_meta:
            return "outline"
        digest = hashlib.sha256()
        for part in parts:
            scheduler = part == "scheduler"
            settings = self.config(part, "scheduler_config.json" if scheduler else "config.json")
            said = {name: settings[name] for name in settings.keys() - _AUTHORS}
            digest.update(f"{part} {json.dumps(said, sort_keys=True)}\n".encode())
            files = weight_files(self.folder(part))
            if not files and not scheduler:
                raise self._missing(part, "it holds no weights (*.safetensors)")
            for file in files:
                digest.update(f"{part}/{file.name} {_file_digest(file)}\n".encode())
        return digest.hexdigest()

    def _download(self, part: str) -> Path:
        if not _HUB_ID.fullmatch(self.source):
            raise self._missing(part, "there is no such folder")
        try:
            if self.placement.on_meta:
                return self._snapshot(part, _DESCRIBING)
            root = self._snapshot(part, (*_DESCRIBING, _SAFE))
            if not weight_files(root / part):
                root = self._snapshot(part, (*_DESCRIBING, _PICKLED))
            return root
        except GatedRepoError as error:
            raise UserError(
                f"'{self.source}' is gated. Accept its terms on "
                f"https://huggingface.co/{self.source} and log in (hf auth login), or name a "
                f"folder that holds it (--set {self.option}=...)."
            ) from error
        except RepositoryNotFoundError as error:
            raise UserError(
                f"The hub has no model '{self.source}', or it is private. Check its name "
                f"(--set {self.option}=...), or log in (hf auth login)."
            ) from error
        except RevisionNotFoundError as error:
            raise UserError(
                f"'{self.source}' has no revision '{self.revision}'. Name a branch, a tag or a "
                "commit of it."
            ) from error
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
            at = f" --revision {self.revision}" if self.revision else ""
            raise UserError(
                f"Cannot load the {_named(part)}'{self.source}': it is not (wholly) in the hub's "
                "cache, and the hub cannot be reached, or HF_HUB_OFFLINE forbids to ask it. "
                f"Download it first (hf download {self.source}{at}), or name a folder that holds "
                f"it (--set {self.option}=...)."
            ) from error

    def _snapshot(self, part: str, names: tuple[str, ...]) -> Path:
        within = f"{part}/" if part else ""
        return Path(
            snapshot_download(
                self.source,
                revision=self.revision,
                allow_patterns=[within + name for name in names],
                # The checkpoint itself is what lies in no subfolder.
                ignore_patterns=[*_VARIANTS, *([] if part else ["*/*"])],
            )
        )

    def _missing(self, part: str, reason: str) -> UserError:
        return UserError(
            f"Cannot load the {_named(part)}'{self.source}': {reason}. Name a folder or hub id in "
            f"diffusers' layout (--set {self.option}=...)."
        )


def weight_files(folder: Path) -> list[Path]:
    """The files that a part's weights are read from, by name: safetensors where there are any."""
    for pattern in (_SAFE, _PICKLED):
        files = [
            path
            for path in sorted(folder.glob(pattern))
            if not any(path.match(variant) for variant in _VARIANTS)
        ]
        if files:
            return files
    return []


def identity(*digests: str, dtype: torch.dtype) -> str:
    """What pairs and checkpoints were made with: 16 hex digits for weights in a precision."""
    return hashlib.sha256(" ".join([*digests, str(dtype)]).encode()).hexdigest()[:16]


@final
class Lazy(Generic[Loaded]):
    """A part that is loaded when it is first used, and can be freed until it is used again."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load = load
        self._loaded: Loaded | None = None

    def get(self) -> Loaded:
        """The part."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def free(self) -> None:
        """Forget it; the next `get` loads it anew."""
        self._loaded = None


def free(*parts: Lazy[Any]) -> None:
    """Free parts, and give their memory back."""
    for part in parts:
        part.free()
    gc.collect()  # networks hold themselves in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def place(network: Network, placement: Placement) -> Network:
    """The network on its device, frozen, in evaluation mode, in memory of its own.

    Loaded weights lie wherever their file has them. Kernels round differently by that, and a copy
    of the network would not equal it to the bit. On the meta device nothing is moved.
    """
    network = network.eval().requires_grad_(False)
    if placement.on_meta:
        return network
    network = network.to(placement.device)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone()
    return network


def place_denoiser(denoiser: Network, placement: Placement) -> Network:
    """As `place`, packed before it is moved."""
    denoiser = denoiser.eval().requires_grad_(False)
    if placement.pack is not None and not placement.on_meta:
        placement.pack(denoiser)
    return place(denoiser, placement)


def _is_network(load: Callable[..., Any]) -> bool:
    network = getattr(load, "__self__", None)
    return isinstance(network, type) and issubclass(network, (ModelMixin, PreTrainedModel))


def _is_scheduler(load: Any) -> bool:
    return issubclass(load.__self__, SchedulerMixin)


def _needs_sentencepiece(folder: Path) -> bool:
    """Whether a tokenizer comes in no other form. transformers would ask for another package."""
    there = (folder / "spiece.model").exists() and not (folder / "tokenizer.json").exists()
    return there and importlib.util.find_spec("sentencepiece") is None


def _named(part: str) -> str:
    return f"{part} of " if part else ""


def _file_digest(path: Path) -> str:
    """SHA-256 of a file. The hub's cache names large files by it, so that those need no reading."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name):
        return blob.name
    return file_digest(path)
