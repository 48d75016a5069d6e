"""Files that appear whole or not at all, and one sentence when the disk says no."""

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
    errno.EFBIG: "the file would be larger than is allowed here",
    errno.ENOTDIR: "a part of that path is a file",
    errno.EEXIST: "a file of that name is in the way",
}


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    with publishing(path) as partial:
        partial.write_bytes(data)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that appears whole or not at all."""
    data = save({name: t.contiguous() for name, t in tensors.items()}, metadata)
    with publishing(path) as partial:
        # Their own save_file makes files that only their owner can read.
        partial.write_bytes(data)


def append_line(path: Path, line: bytes) -> None:
    """Add a line, without its break, to a file; it is on the disk when this returns.

    What did not arrive whole is taken back, or the next line would be glued to it.
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
    """Give a path beside `path` to write to; sync it and rename it into place at the end.

    The name keeps its ending, by which encoders choose their format.
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
    """See that a file's content, or a folder's names, outlive a power cut."""
    if path.is_dir() and os.name != "posix":  # Windows syncs no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(
            f"Cannot write to '{where}': {reason}. What was written before is safe; put that right "
            "and run the same command again to go on."
        ) from error


def _reason(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return _REASONS.get(error.errno or 0)
    # peft saves by safetensors, which reports the system's error number in its text only.
    number = re.search(r"(?:os error|code:) (\d+)", str(error))
    return _REASONS.get(int(number[1])) if number else None
