"""Atomic file writes, and disk errors as a UserError."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from dpo_video.errors import UserError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EIO: "the disk reports an error",
    errno.EFBIG: "the file would exceed the size limit",
    errno.ENOTDIR: "a parent of that path is a file",
    errno.EEXIST: "a file of that name exists",
}


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with publishing(path) as partial:
        partial.write_bytes(data)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    data = save({name: t.contiguous() for name, t in tensors.items()}, metadata)
    with publishing(path) as partial:
        # safetensors' own save_file creates files that only their owner can read.
        partial.write_bytes(data)


def append_line(path: Path, line: bytes) -> None:
    """Append a line (given without its line break) to a file and sync it to disk.

    A partial write is truncated again, so that the next line does not continue it.
    """
    rest = line + b"\n"
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; sync it and rename it to `path` on success.

    The temporary name keeps the suffix, from which encoders choose their format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's content or a folder's entries to disk (fsync)."""
    if path.is_dir() and os.name != "posix":  # Windows cannot sync folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(where: Path, then: str = "run the same command again to resume") -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a UserError, with the next step `then`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(
            f"Cannot write to '{where}': {reason}. Everything written before is intact; fix the "
            f"cause and {then}."
        ) from error


def _reason(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return _REASONS.get(error.errno or 0)
    # safetensors (used by peft) reports the system's error number in its message only.
    number = re.search(r"(?:os error|code:) (\d+)", str(error))
    return _REASONS.get(int(number[1])) if number else None
