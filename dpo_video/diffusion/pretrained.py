"""Checkpoints in diffusers' layout: find, download, load and hash their parts."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import diffusers
import torch
import transformers
from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn
from transformers import PreTrainedModel

from dpo_video.diffusion.known_models import find_model
from dpo_video.errors import UserError
from dpo_video.paths import is_hub_id
from dpo_video.support.hashing import file_digest
from dpo_video.support.reading import parse_json, read_bytes
from dpo_video.text import quoted
from dpo_video.types import Placement

Loaded = TypeVar("Loaded")
Network = TypeVar("Network", bound=nn.Module)

# Keys of a configuration that describe its file, not the network.
_METADATA = {"_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version"}
_DESCRIBING = ("*.json", "*.txt", "*.model")  # configurations, vocabularies, shard indices
_SAFE, _PICKLED = "*.safetensors", "*.bin"
# Further copies of the weights.
_VARIANTS = ("*.fp16.*", "*.bf16.*", "*.fp16-*", "*.bf16-*", "*non_ema*")
_BLOB = re.compile(r"[0-9a-f]{64}")


@final
@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's folder or hub repository, and where its parts are loaded to.

    A part is a subfolder such as "vae"; "" is the checkpoint itself, where it is a single network.
    Only the files of the parts that are loaded are downloaded. With HF_HUB_OFFLINE=1 only the hub's
    cache is used.
    """

    source: str
    """Folder or hub id. The name of a known model stands for its hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the main branch if None."""
    option: str = "backbone.model"
    """The option that names the source, for error messages."""
    placement: Placement = field(default_factory=Placement)
    """With `on_meta`, networks are built on the meta device in the dtype that they would be loaded
    in, tokenizers are None, and only JSON is read (for known models, the package's own)."""

    def __post_init__(self) -> None:
        model = find_model(self.source)
        if model and self._local is None and self.source.lower() == model.name:
            object.__setattr__(self, "source", model.hub[0])

    @property
    def _local(self) -> Path | None:
        """The source as a folder; None if there is none, or no folder can have that name."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # RuntimeError: ~nobody
            folder = Path(self.source).expanduser()
            if folder.is_dir():
                return folder
        return None

    def folder(self, part: str = "") -> Path:
        """The part's local folder, downloaded if need be; a UserError if there is none."""
        model = find_model(self.source) if self.placement.on_meta else None
        if os.path.isfile(self.source):  # noqa: PTH113 - False also for what no path can be
            kind = "MotionAdapter" if "adapter" in self.option else "StableDiffusionPipeline"
            raise UserError(
                f"'{self.source}' is a single file, and a folder in diffusers' layout is needed. "
                f"Convert it once in Python, with diffusers' {kind} or the pipeline of its model: "
                f"{kind}.from_single_file({self.source!r}).save_pretrained('FOLDER'), and name "
                f"that folder (--set {self.option}=FOLDER)."
            )
        root = self._local or (model.folder if model else self._download(part))
        folder = root / part
        if not folder.is_dir():
            raise self._missing(part, f"it has no folder '{part}'")
        return folder

    def config(self, part: str = "", file: str = "config.json") -> dict[str, Any]:
        """A part's configuration."""
        path = self.folder(part) / file
        try:
            config = parse_json(read_bytes(path))
        except FileNotFoundError as error:
            raise self._missing(part, f"it has no '{Path(part) / file}'") from error
        except (OSError, ValueError) as error:
            raise self._missing(part, f"'{Path(part) / file}' cannot be read ({error})") from error
        if not isinstance(config, dict):
            raise self._missing(part, f"'{Path(part) / file}' is no table")
        return config

    def full_config(self, network: type[Any], part: str = "") -> Mapping[str, Any]:
        """A part's configuration, completed with the defaults of its diffusers class."""
        with torch.device("meta"):
            full: Mapping[str, Any] = network.from_config(self.config(part)).config
        return full

    def load(
        self,
        kind: type[Loaded],
        part: str = "",
        *,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Loaded:
        """Load a part by its class's `from_pretrained`, on the CPU.

        Args:
            kind: A network, tokenizer or scheduler class of diffusers or transformers.
            part: Its folder.
            dtype: Precision of a network; the placement's if None.
            options: Further arguments of `from_pretrained`.

        Raises:
            UserError: if that fails, or if files lack weights of the network, which the libraries
                initialize at random with no more than a warning.
        """
        cls: Any = kind
        if issubclass(cls, (ModelMixin, PreTrainedModel)):
            name = "torch_dtype" if issubclass(cls, ModelMixin) else "dtype"
            options = {name: dtype or self.placement.dtype, "output_loading_info": True, **options}
        if self.placement.on_meta and not issubclass(cls, SchedulerMixin):
            built: Loaded = self._build_on_meta(cls, part, options.get("torch_dtype"))
            return built
        folder = self.folder(part)
        if _needs_sentencepiece(folder):
            raise UserError(
                f"The {part} of '{self.source}' is a SentencePiece model, and the package that "
                "reads it is not installed. Install it: pip install sentencepiece"
            )
        try:
            with warnings.catch_warnings():
                # diffusers passes the hub's client an argument that the client ignores.
                warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
                result: Any = cls.from_pretrained(str(folder), **options)
        except (OSError, ValueError, ImportError) as error:
            raise self._missing(part, str(error).strip().splitlines()[0].rstrip(".")) from error
        if "output_loading_info" not in options:
            other: Loaded = result
            return other
        loaded: Loaded = result[0]
        if missing := sorted(result[1]["missing_keys"]):
            raise self._missing(
                part,
                f"its files lack {len(missing)} of its weights, '{missing[0]}' first, so they are "
                "damaged or were written for another version of the library",
            )
        return loaded

    def lazy(
        self, kind: type[Loaded], part: str = "", *, dtype: torch.dtype | None = None
    ) -> Lazy[Loaded]:
        """A network that is loaded and placed on first use."""

        def load() -> Loaded:
            network: Any = self.load(kind, part, dtype=dtype)
            pack = self.placement.pack_text_encoder
            if part == "text_encoder" and pack is not None and not self.placement.on_meta:
                pack(network.requires_grad_(False))
            placed: Loaded = place(network, self.placement)
            return placed

        return Lazy(load)

    def _build_on_meta(self, cls: Any, part: str, dtype: torch.dtype | None) -> Any:
        if issubclass(cls, PreTrainedModel):
            config = cls.config_class.from_dict(dict(self.config(part)))
            with torch.device("meta"):
                return cls(config).to(dtype or self.placement.dtype)
        if dtype is None:
            return None  # a tokenizer
        with torch.device("meta"):
            network = cls.from_config(dict(self.config(part)))
        # As in from_pretrained: a class may keep modules in fp32; if it does, buffers stay too.
        kept = cls._keep_in_fp32_modules
        buffers = () if kept else network.named_buffers()
        for name, tensor in (*network.named_parameters(), *buffers):
            if tensor.is_floating_point() and not {*(kept or ())} & {*name.split(".")}:
                tensor.data = tensor.data.to(dtype)
        return network

    def digest(self, *parts: str) -> str:
        """SHA-256 of the parts' configurations and weight files; a constant on the meta device.

        Configurations count because a network with other settings, or a scheduler with another
        prediction type, predicts differently from the same weights. Metadata does not count.
        """
        if self.placement.on_meta:
            return "meta"
        digest = hashlib.sha256()
        for part in parts:
            scheduler = part == "scheduler"
            settings = self.config(part, "scheduler_config.json" if scheduler else "config.json")
            described = {name: settings[name] for name in settings.keys() - _METADATA}
            digest.update(f"{part} {json.dumps(described, sort_keys=True)}\n".encode())
            files = weight_files(self.folder(part))
            if not files and not scheduler:
                raise self._missing(part, _no_weights(self.folder(part)))
            for file in files:
                digest.update(f"{part}/{file.name} {_file_digest(file)}\n".encode())
        return digest.hexdigest()

    def _download(self, part: str) -> Path:
        if not _is_hub_id(self.source):
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
            at = f" --revision {quoted(self.revision)}" if self.revision else ""
            raise UserError(
                f"Cannot load the {_named(part)}'{self.source}': there is no such folder here, it "
                "is not (completely) in the hub's cache, and the hub cannot be reached or "
                f"HF_HUB_OFFLINE is set. Download it first (hf download {self.source}{at}), or "
                f"name a folder that holds it (--set {self.option}=...)."
            ) from error

    def _snapshot(self, part: str, names: tuple[str, ...]) -> Path:
        within = f"{part}/" if part else ""
        return Path(
            snapshot_download(
                self.source,
                revision=self.revision,
                allow_patterns=[within + name for name in names],
                # The checkpoint itself has no files in subfolders.
                ignore_patterns=[*_VARIANTS, *([] if part else ["*/*"])],
            )
        )

    def _missing(self, part: str, reason: str) -> UserError:
        return UserError(
            f"Cannot load the {_named(part)}'{self.source}': {reason}. Name a folder or hub id in "
            f"diffusers' layout (--set {self.option}=...)."
        )


def _is_hub_id(source: str) -> bool:
    """Whether a name may be on the hub; the name of a folder, such as `./model`, may not."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return is_hub_id(source)


def weight_files(folder: Path) -> list[Path]:
    """The files that a part's weights are read from, sorted: safetensors if there are any."""
    for pattern in (_SAFE, _PICKLED):
        files = [
            path
            for path in sorted(folder.glob(pattern))
            if not any(path.match(variant) for variant in _VARIANTS)
        ]
        if files:
            return files
    return []


def _no_weights(folder: Path) -> str:
    """Why a folder has no `weight_files`."""
    for variant in ("fp16", "bf16"):
        if copies := sorted(folder.glob(f"*.{variant}[.-]*")):
            return (
                f"it holds {variant} weights only ('{copies[0].name}'), which are read once they "
                f"are named without '.{variant}'"
            )
    return "it holds no weights (*.safetensors)"


def identity(*digests: str, dtype: torch.dtype) -> str:
    """`VideoModel.identity`: 16 hex digits for weights in a dtype."""
    return hashlib.sha256(" ".join([*digests, str(dtype)]).encode()).hexdigest()[:16]


@final
class Lazy(Generic[Loaded]):
    """A part that is loaded on first use, and again after it was freed."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load = load
        self._loaded: Loaded | None = None

    def get(self) -> Loaded:
        """The part."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def free(self) -> bool:
        """Drop it; the next `get` loads it again. Returns whether it was loaded."""
        loaded, self._loaded = self._loaded is not None, None
        return loaded


def free(*parts: Lazy[Any]) -> None:
    """Free parts, and return their memory to the device."""
    if not any([part.free() for part in parts]):
        return
    gc.collect()  # networks contain reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of diffusers and transformers inside."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)


def place(network: Network, placement: Placement) -> Network:
    """Move a network to its device: frozen, in evaluation mode, its weights in memory of their own.

    Tensors read from a file have the file's memory alignment. Kernels round differently by that,
    and a copy of the network would not equal it to the bit. On the meta device nothing is moved.
    """
    network = network.eval().requires_grad_(False)
    if placement.on_meta:
        return network
    network = network.to(placement.device)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone()
    return network


def place_denoiser(denoiser: Network, placement: Placement) -> Network:
    """As `place`, with the denoiser's weights packed before they are moved."""
    denoiser = denoiser.eval().requires_grad_(False)
    if placement.pack is not None and not placement.on_meta:
        placement.pack(denoiser)
    if placement.denoiser_on_host:
        placement = replace(placement, device=torch.device("cpu"))
    return place(denoiser, placement)


def _needs_sentencepiece(folder: Path) -> bool:
    """Whether a tokenizer is a SentencePiece model only, for which the package is missing.

    transformers would name another package.
    """
    only = (folder / "spiece.model").exists() and not (folder / "tokenizer.json").exists()
    return only and importlib.util.find_spec("sentencepiece") is None


def _named(part: str) -> str:
    return f"{part} of " if part else ""


def _file_digest(path: Path) -> str:
    """SHA-256 of a file, which the hub's cache uses as the name of large files."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name):
        return blob.name
    return file_digest(path)
