"""Where a store's files are: a folder here, or whatever fsspec reaches by a URL.

Places read; nothing here writes. They may be used from several threads at once.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, final

from fsspec.core import url_to_fs
from safetensors.torch import load, load_file
from torch import Tensor

from dpo_video.errors import StoreError

PAUSES = (0.5, 1.0, 2.0)  # seconds before a read from elsewhere is tried again
MAPPED = 1 << 20  # bytes of a file from which on it is mapped
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
Result = TypeVar("Result")


class Storage(ABC):
    """A folder to read from."""

    @abstractmethod
    def path(self, name: str) -> str:
        """What a file is called in messages."""

    @abstractmethod
    def read(self, name: str, start: int = 0) -> bytes:
        """A file from a byte on; FileNotFoundError if there is none, OSError if it is damaged."""

    @abstractmethod
    def load(self, name: str) -> dict[str, Tensor]:
        """A whole safetensors file; OSError or SafetensorError if it is none."""

    @abstractmethod
    def parts(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytearray]:
        """The bytes of a file from each start to each stop; OSError if there are fewer."""


def is_url(where: Path | str) -> bool:
    """Whether it is for fsspec: `s3://...`, `https://...`, `memory://...`; not `file://...`."""
    return "://" in str(where) and not str(where).startswith(("file://", "local://"))


def folder_of(where: Path | str) -> Path:
    """The folder that a path or a `file://` URL names."""
    text = str(where)
    return Path(text.split("://", 1)[1] if text.startswith(("file://", "local://")) else text)


@final
class LocalStorage(Storage):
    """A folder of this machine, or of a disk that it shares."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> str:
        """Its path."""
        return str(self._folder / name)

    def read(self, name: str, start: int = 0) -> bytes:
        """See `Storage`."""
        with (self._folder / name).open("rb") as file:
            file.seek(start)
            return file.read()

    def load(self, name: str) -> dict[str, Tensor]:
        """See `Storage`. A large file is mapped, which costs more than copying a small one."""
        path = self._folder / name
        return load(path.read_bytes()) if path.stat().st_size < MAPPED else load_file(path)

    def parts(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytearray]:
        """See `Storage`."""
        with (self._folder / name).open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if any(not 0 <= start <= stop <= size for start, stop in spans):
                raise OSError("it is shorter than it says")  # and no memory is taken for it
            found = [bytearray(stop - start) for start, stop in spans]
            for part, (start, _) in zip(found, spans, strict=True):
                file.seek(start)
                if file.readinto(part) != len(part):
                    raise OSError("it has become shorter")
        return found


@final
class RemoteStorage(Storage):
    """What a URL names. A connection that breaks is tried again, a few times."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._files, root = url_to_fs(self.url)
        except ImportError as error:  # it names the package
            raise StoreError(
                f"'{url}' cannot be read here: {error}. Install that with pip, or copy the pairs "
                "to this machine."
            ) from error
        except Exception as error:  # every protocol has its own
            raise StoreError(
                f"'{url}' cannot be read ({_said(error)}). Check the address; fsspec's "
                "documentation lists the protocols."
            ) from error
        self._root = str(root).rstrip("/")

    def path(self, name: str) -> str:
        """Its URL."""
        return f"{self.url}/{name}"

    def read(self, name: str, start: int = 0) -> bytes:
        """See `Storage`."""
        return self._patiently(name, lambda path: self._files.cat_file(path, start=start or None))

    def load(self, name: str) -> dict[str, Tensor]:
        """See `Storage`."""
        return load(self.read(name))

    def parts(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytearray]:
        """See `Storage`. All at once, where the protocol can."""
        starts, stops = [start for start, _ in spans], [stop for _, stop in spans]

        def fetch(path: str) -> list[bytearray]:
            found = self._files.cat_ranges([path] * len(spans), starts, stops, on_error="raise")
            for data, (start, stop) in zip(found, spans, strict=True):
                if len(data) != stop - start:
                    raise OSError(f"{len(data)} bytes instead of {stop - start}")
            return [bytearray(data) for data in found]

        return self._patiently(name, fetch)

    def _patiently(self, name: str, fetch: Callable[[str], Result]) -> Result:
        pauses = iter(PAUSES)
        while True:
            try:
                return fetch(f"{self._root}/{name}")
            except _FINAL:
                raise
            except Exception as error:  # every protocol has its own
                pause = next(pauses, None)
                if pause is None:
                    raise StoreError(
                        f"'{self.path(name)}' cannot be read ({_said(error)}), tried "
                        f"{len(PAUSES) + 1} times. Check the connection and that the server "
                        "answers requests for parts of files, and run the same command again."
                    ) from error
                time.sleep(pause)


def _said(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
