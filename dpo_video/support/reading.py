"""Read files that may come from anybody: regular files only, of limited size.

Every reader of text, lines, JSON and TOML goes through here, so that all treat line ends, byte
order marks and hostile values alike. A file that cannot be read raises an OSError whose `strerror`
completes "Cannot read FILE: ...".
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_TEXT = 16 << 20  # bytes of a text file, and of a line of a list
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Without O_NONBLOCK, opening a pipe waits for its writer. Windows has no O_NONBLOCK.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file; an OSError for a folder, a pipe, a socket and a device."""
    try:
        descriptor = os.open(path, _FLAGS)
    except ValueError as error:  # a null byte or a lone surrogate in the name
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from error
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            what = _KINDS.get(kind, "something else")
            raise OSError(errno.EINVAL, f"it is {what}, not a file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: Path) -> None:
    """An OSError unless it is a regular file; for libraries that open it themselves."""
    open_regular(path).close()


def read_bytes(path: Path, limit: int = MAX_TEXT) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit >> 20} MiB", str(path))
    return data


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark."""
    return _decoded(read_bytes(path), path)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Number and text of every line that is not blank, read one by one.

    Lines end at `\n` or `\r\n` alone: U+2028, U+0085 and form feeds are characters of a caption. A
    byte order mark is dropped from every line, since files are concatenated.
    """
    number = 0
    with open_regular(path) as file:
        while data := file.readline(MAX_TEXT + 1):
            number += 1
            if len(data) > MAX_TEXT:
                reason = f"its line {number} is longer than {MAX_TEXT >> 20} MiB"
                raise OSError(errno.EFBIG, reason, str(path))
            if line := _decoded(data, path).strip():
                yield number, line


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, "it is not UTF-8 text", str(path)) from error


def parse_json(text: str | bytes, *, storable: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        text: The text.
        storable: Refuse half a character (a lone surrogate), which no file can store.

    Raises:
        ValueError: If it is not JSON, is nested too deeply, names a key twice, or is not storable.
    """
    try:
        found = json.loads(text, object_pairs_hook=_distinct)
        json.dumps(found, ensure_ascii=False).encode(errors="strict" if storable else "replace")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half a character (a lone surrogate)") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from error
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it names {key!r} twice")
        found[key] = value
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not TOML.
    """
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def one_spaced(text: str) -> str:
    """The text with every run of white space, also of U+2028 and U+0085, as one space."""
    return " ".join(text.split())


def composed(text: str) -> str:
    """The text in Unicode's form NFC, in which names from macOS and from Linux are equal."""
    return unicodedata.normalize("NFC", text)


def decomposed(text: str) -> str:
    """The text in Unicode's form NFD, in which macOS stores names."""
    return unicodedata.normalize("NFD", text)


class Names:
    r"""Find files by names that another system wrote: with `\`, or in another Unicode form."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[Path, dict[str, str]] = {}

    def find(self, name: str) -> Path | None:
        """The file or folder that a name relative to the root means; None if there is none."""
        for text in dict.fromkeys((name, name.replace("\\", "/"))):
            path = self._root / text
            if exists(path):
                return path
        found = self._root
        for part in Path(name.replace("\\", "/")).parts:
            if not exists(found / part):
                part = self._listed(found).get(composed(part), "")
                if not part:
                    return None
            found = found / part
        return found

    def _listed(self, folder: Path) -> dict[str, str]:
        """Names in a folder by their composed form."""
        if folder not in self._folders:
            names: list[str] = []
            with contextlib.suppress(OSError, ValueError):
                names = sorted(path.name for path in folder.iterdir())
            self._folders[folder] = {composed(name): name for name in names}
        return self._folders[folder]


def exists(path: Path) -> bool:
    """Whether there is a file or folder; False also for a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
