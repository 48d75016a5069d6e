"""Read a store's files from a local folder, or from a URL through fsspec.

Reading is safe from several threads at once; nothing here writes.
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
from dpo_video.support.reading import open_regular
from dpo_video.support.urls import check_url, without_credentials

PAUSES = (0.5, 1.0, 2.0)  # seconds before each retry of a remote read
MAPPED = 1 << 20  # bytes; larger files are memory-mapped
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
Result = TypeVar("Result")


class Storage(ABC):
    """A folder to read from."""

    @abstractmethod
    def path(self, name: str) -> str:
        """A file's name in messages."""

    @abstractmethod
    def read(self, name: str, start: int = 0) -> bytes:
        """The bytes of a file from `start` on; FileNotFoundError or another OSError if it fails."""

    @abstractmethod
    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file; OSError or SafetensorError if it fails."""

    @abstractmethod
    def parts(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytearray]:
        """Several byte ranges [start, stop) of a file; OSError if it is too short."""


@final
class LocalStorage(Storage):
    """A folder of a local or mounted disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> str:
        """Its path."""
        return str(self._folder / name)

    def read(self, name: str, start: int = 0) -> bytes:
        """See `Storage`."""
        with open_regular(self._folder / name) as file:
            file.seek(start)
            return file.read()

    def load(self, name: str) -> dict[str, Tensor]:
        """See `Storage`. Large files are memory-mapped; small ones are faster to copy."""
        path = self._folder / name
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size < MAPPED:
                return load(file.read())
        return load_file(path)

    def parts(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytearray]:
        """See `Storage`."""
        with open_regular(self._folder / name) as file:
            size = file.seek(0, os.SEEK_END)
            if any(not 0 <= start <= stop <= size for start, stop in spans):
                raise OSError("it is shorter than its header says")  # before memory is allocated
            found = [bytearray(stop - start) for start, stop in spans]
            for part, (start, _) in zip(found, spans, strict=True):
                file.seek(start)
                if file.readinto(part) != len(part):
                    raise OSError("it became shorter while it was read")
        return found


@final
class RemoteStorage(Storage):
    """A URL that fsspec reads. Failed reads are retried a few times."""

    def __init__(self, url: str) -> None:
        address = check_url(url.rstrip("/"))
        self.url = without_credentials(address)
        try:
            self._files, root = url_to_fs(address)
        except ImportError as error:  # its message names the package
            raise StoreError(
                f"'{url}' cannot be read: {error}. Install that package with pip, or copy the "
                "pairs to this machine."
            ) from error
        except Exception as error:  # every protocol has its own exceptions
            raise StoreError(
                f"'{url}' cannot be read ({_reason(error)}). Check the address."
            ) from error
        self._root = str(root).rstrip("/")

    def path(self, name: str) -> str:
        """Its URL, without credentials."""
        return f"{self.url}/{name}"

    def read(self, name: str, start: int = 0) -> bytes:
        """See `Storage`."""
        return self._retry(name, lambda path: self._files.cat_file(path, start=start or None))

    def load(self, name: str) -> dict[str, Tensor]:
        """See `Storage`."""
        return load(self.read(name))

    def parts(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytearray]:
        """See `Storage`. The ranges are fetched concurrently if the protocol supports it."""
        starts, stops = [start for start, _ in spans], [stop for _, stop in spans]

        def fetch(path: str) -> list[bytearray]:
            found = self._files.cat_ranges([path] * len(spans), starts, stops, on_error="raise")
            for data, (start, stop) in zip(found, spans, strict=True):
                if len(data) != stop - start:
                    raise OSError(f"{len(data)} bytes instead of {stop - start}")
            return [bytearray(data) for data in found]

        return self._retry(name, fetch)

    def _retry(self, name: str, fetch: Callable[[str], Result]) -> Result:
        pauses = iter(PAUSES)
        while True:
            try:
                return fetch(f"{self._root}/{name}")
            except _FINAL:
                raise
            except Exception as error:  # every protocol has its own exceptions
                pause = next(pauses, None)
                if pause is None:
                    raise StoreError(
                        f"'{self.path(name)}' cannot be read after {len(PAUSES) + 1} attempts "
                        f"({_reason(error)}). Check the connection, the password if it needs one "
                        "(--pairs https://USER:PASSWORD@HOST/...; a run does not keep it), and "
                        "that the server supports range requests, then try again."
                    ) from error
                time.sleep(pause)


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
