"""Checkpoints in diffusers' layout or single files: find, download, load and hash their parts."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
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

from dpo_video.diffusion.known_models import find_model, known_models
from dpo_video.diffusion.single_file import FileError, FilePart, SingleFile, cast
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
# Further copies of the weights, read where there are no others.
_VARIANTS = ("fp16", "bf16")
_COPIES = (*(f"*.{name}{end}*" for name in _VARIANTS for end in ".-"), "*non_ema*")
_CONFIG_SUFFIXES = {".json", ".txt", ".model"}
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
    parts_in_file: Mapping[str, FilePart] = field(default_factory=dict)
    """The parts that a single .safetensors file as the source can hold, its denoiser first."""
    config_source: str | None = None
    """Where the source is a single file: the folder or hub id of the configurations, and of the
    parts that the file lacks. None stands for a config.json beside it, or else for the known model
    whose denoiser has the file's shapes."""
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

    @cached_property
    def file(self) -> SingleFile | None:
        """The single file that the source is; None for a folder or hub id.

        Raises:
            UserError: for a file that is not read.
        """
        if not os.path.isfile(self.source):  # noqa: PTH113 - False also for what no path can be
            return None
        path = Path(self.source).expanduser()
        if path.suffix.lower() != ".safetensors" or not self.parts_in_file:
            kind = "MotionAdapter" if "adapter" in self.option else "StableDiffusionPipeline"
            also = " or a .safetensors file" if self.parts_in_file else ""
            raise UserError(
                f"'{self.source}' is a file, and a folder in diffusers' layout{also} is needed. "
                f"Convert it once in Python: diffusers.{kind}.from_single_file({self.source!r})"
                f".save_pretrained('FOLDER'), and name that folder (--set {self.option}=FOLDER)."
            )
        file = SingleFile(path)
        part, held = next(iter(self.parts_in_file.items()))
        try:
            if not file.holds(held):
                raise FileError(f"it has no weights named '{held.prefix}*'")
        except FileError as error:
            raise self._missing(part, str(error)) from error
        return file

    @cached_property
    def described_by(self) -> Checkpoint:
        """The checkpoint of the configurations: itself, unless the source is a single file.

        Raises:
            UserError: if none is named, and not exactly one known model has the file's shapes.
        """
        if self.file is None:
            return self
        main = self.option == "backbone.model"
        option = "backbone.config" if main else f"{self.option}_config"
        source = self.config_source
        part, held = next(iter(self.parts_in_file.items()))
        if source is None and part == "" and self.file.path.with_name("config.json").is_file():
            source = str(self.file.path.parent)
        if source is None:
            fitting = [
                model.name
                for model in known_models()
                if (model.folder / part / "config.json").is_file()
                and self.file.fits(held, _table(model.folder / part / "config.json"))
            ]
            if len(fitting) != 1:
                which = f"one of {', '.join(fitting)}" if fitting else "unknown to this version"
                raise UserError(
                    f"'{self.source}' holds the weights of a model that is {which}. Name the "
                    "folder or hub id of its configurations, tokenizer and other parts "
                    f"(--set {option}={fitting[0] if fitting else 'FOLDER'})."
                )
            source = fitting[0]
        return replace(
            self, source=source, revision=None, option=option, parts_in_file={}, config_source=None
        )

    def _held(self, part: str) -> FilePart | None:
        """A part that the single file holds."""
        held = self.parts_in_file.get(part)
        return held if held and self.file and self.file.holds(held) else None

    def folder(self, part: str = "", *, weights: bool = True) -> Path:
        """The part's local folder, downloaded if need be; a UserError if there is none.

        Of a part that a single file holds, and without `weights`, it has configurations only.
        """
        if self.file is not None:
            return self.described_by.folder(part, weights=weights and self._held(part) is None)
        weights = weights and not self.placement.on_meta
        model = None if weights else find_model(self.source)
        root = self._local or (model.folder if model else self._download(part, weights=weights))
        folder = root / part
        if not folder.is_dir():
            raise self._missing(part, f"it has no folder '{part}'")
        return folder

    def copy(self, part: str, target: Path) -> None:
        """Write a part in diffusers' layout into a new folder, without the name of a variant."""
        if held := self._held(part):
            self.load(held.network, part).save_pretrained(target)
            return
        source = self.folder(part)
        files, variant = weight_files(source), variant_of(source)
        marker = f".{variant}" if variant else ""
        target.mkdir()
        for path in source.iterdir():
            name = path.name.replace(marker, "")
            if path in files or (path.suffix in _CONFIG_SUFFIXES and name == path.name):
                shutil.copyfile(path, target / name)
            elif path.suffix in _CONFIG_SUFFIXES:  # an index of shards, which names its files
                index = path.read_text(encoding="utf-8").replace(marker, "")
                (target / name).write_text(index, encoding="utf-8")

    def config(self, part: str = "", file: str = "config.json") -> dict[str, Any]:
        """A part's configuration."""
        if self.file is None:
            return self._config(part, file, weights=True)
        held = self._held(part) if file == "config.json" else None
        found = self.described_by._config(part, file, weights=held is None)
        return dict(self.file.settings(held, found)) if held else found

    def _config(self, part: str, file: str, *, weights: bool) -> dict[str, Any]:
        path = self.folder(part, weights=weights) / file
        try:
            return _table(path)
        except FileNotFoundError as error:
            raise self._missing(part, f"it has no '{Path(part) / file}'") from error
        except (OSError, ValueError) as error:
            raise self._missing(part, f"'{Path(part) / file}' cannot be read ({error})") from error

    def full_config(self, network: type[Any], part: str = "") -> Mapping[str, Any]:
        """A part's configuration, completed with the defaults of its diffusers class."""
        with torch.device("meta"):
            full: Mapping[str, Any] = network.from_config(self.config(part)).config
        return full

    def exported(self, part: str) -> dict[str, Any]:
        """The fields of `ExportSpec` that say where the checkpoint is; `part` is its denoiser."""
        return {
            "source": self.described_by.source,
            "revision": self.revision,
            "file": None if self.file is None else self.source,
            "variant": None if self.file is not None else variant_of(self.folder(part)),
            "folder": self.folder,
            "copy": self.copy,
        }

    def loading_code(self, name: str) -> str:
        """Python that loads a checkpoint of one network, of a class of diffusers."""
        options = {"revision": self.revision, "variant": self.exported("")["variant"]}
        method = "from_pretrained"
        if self.file is not None:
            method, options = "from_single_file", {"config": self.described_by.source}
        given = "".join(f", {key}={value!r}" for key, value in options.items() if value)
        return f"{name}.{method}({self.source!r}{given})"

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
        held = self._held(part)
        if self.file is not None and held is None:
            return self.described_by.load(kind, part, dtype=dtype, **options)
        if issubclass(cls, (ModelMixin, PreTrainedModel)):
            name = "torch_dtype" if issubclass(cls, ModelMixin) else "dtype"
            options = {name: dtype or self.placement.dtype, "output_loading_info": True, **options}
        if self.placement.on_meta and not issubclass(cls, SchedulerMixin):
            built: Loaded = self._build_on_meta(cls, part, options.get("torch_dtype"))
            return built
        if self.file is not None and held is not None:
            try:
                if cls is not held.network:
                    raise FileError(f"it holds a {held.network.__name__}, not a {cls.__name__}")
                with quiet():
                    return self.file.load(held, self.config(part), dtype or self.placement.dtype)
            except FileError as error:
                raise self._missing(part, str(error)) from error
        folder = self.folder(part)
        if _needs_sentencepiece(folder):
            raise UserError(
                f"The {part} of '{self.source}' is a SentencePiece model, and the package that "
                "reads it is not installed. Install it: pip install sentencepiece"
            )
        if issubclass(cls, (ModelMixin, PreTrainedModel)) and (variant := variant_of(folder)):
            options["variant"] = variant
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
        return cast(network, dtype)

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
            if self.file is not None and self._held(part):
                digest.update(f"{part} in {_file_digest(self.file.path)}\n".encode())
                continue
            files = weight_files(self.folder(part))
            if not files and not scheduler:
                raise self._missing(part, "it holds no weights (*.safetensors)")
            for file in files:
                digest.update(f"{part}/{file.name} {_file_digest(file)}\n".encode())
        return digest.hexdigest()

    def _download(self, part: str, *, weights: bool) -> Path:
        if not _is_hub_id(self.source):
            raise self._missing(part, "there is no such folder")
        try:
            if not weights:
                return self._snapshot(part, _DESCRIBING)
            for names, ignored in (
                ((*_DESCRIBING, _SAFE), _COPIES),
                ((*_DESCRIBING, _PICKLED), _COPIES),
                ((*_DESCRIBING, _SAFE), _COPIES[-1:]),
            ):
                root = self._snapshot(part, names, ignored)
                if weight_files(root / part):
                    break
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

    def _snapshot(
        self, part: str, names: tuple[str, ...], ignored: tuple[str, ...] = _COPIES
    ) -> Path:
        within = f"{part}/" if part else ""
        return Path(
            snapshot_download(
                self.source,
                revision=self.revision,
                allow_patterns=[within + name for name in names],
                # The checkpoint itself has no files in subfolders.
                ignore_patterns=[*ignored, *([] if part else ["*/*"])],
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
    """The files that a part's weights are read from, sorted: safetensors if there are any.

    A variant (fp16 or bf16) is read where there are no other weights.
    """
    for pattern in (_SAFE, _PICKLED):
        files = [
            path
            for path in sorted(folder.glob(pattern))
            if not any(path.match(copies) for copies in _COPIES)
        ]
        if files:
            return files
    return _variant_files(folder)[1]


def variant_of(folder: Path) -> str | None:
    """The variant that a part's weights are read from; None for weights without one."""
    variant, files = _variant_files(folder)
    return variant if files and weight_files(folder) == files else None


def _variant_files(folder: Path) -> tuple[str | None, list[Path]]:
    for variant in _VARIANTS:
        if files := sorted(folder.glob(f"*.{variant}[.-]*safetensors")):
            return variant, files
    return None, []


def _table(path: Path) -> dict[str, Any]:
    """A JSON file's table.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is none.
    """
    found = parse_json(read_bytes(path))
    if not isinstance(found, dict):
        raise ValueError("no table")
    return found


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
