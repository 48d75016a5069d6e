"""A simulated disk that fails at a chosen operation of one process.

Python writes through `io.open`, `os.fsync`, `os.replace`, `os.rename` and `os.unlink`. These calls
are counted, and the chosen one fails. Files that libraries write themselves count as not synced
until they are synced.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("kill", "torn", "power", "full", "broken")
"""SIGKILL before the operation; after half of it; with a loss of all unsynced data; ENOSPC and EIO
from that operation on."""


class Disk:
    """Counts operations in `root` and fails at number `at`, in one of the ways of `KINDS`."""

    def __init__(self, root: Path, kind: str = "", at: int = -1) -> None:
        self.root, self.kind, self.at = os.path.realpath(root), kind, at
        self.count = 0
        self.synced: dict[str, int] = {}
        """Bytes of each file that survive a power cut."""

    def install(self) -> None:
        """Patch the file functions of this process, which must exist for this purpose alone."""
        self._fsync, self._open = os.fsync, io.open
        opened = self._opened
        io.open = builtins.open = opened  # type: ignore[assignment]
        os.fsync = self._synced  # type: ignore[assignment]
        for name in ("replace", "rename", "unlink"):
            setattr(os, name, self._moving(getattr(os, name), name))

    def report(self, path: Path) -> None:
        """Write the count and the bytes that survive a power cut, for the campaign."""
        with self._open(path, "w") as file:
            json.dump({"count": self.count, "synced": self.synced}, file)

    def operation(self, path: Any, torn: Callable[[], Any] | None = None) -> None:
        """Count an operation, and fail if it is the chosen one."""
        if not self._inside(path):
            return
        self.count += 1
        if self.count < self.at or self.at < 0:
            return
        if self.kind in ("full", "broken"):
            number = errno.ENOSPC if self.kind == "full" else errno.EIO
            if torn is not None and self.count == self.at:
                torn()  # a disk fills in the middle of a write
            raise OSError(number, os.strerror(number), str(path))
        if self.count == self.at:
            if self.kind == "torn" and torn is not None:
                torn()
            self.report(Path(self.root).with_suffix(".synced"))
            os.kill(os.getpid(), signal.SIGKILL)

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):
            path = str(Path(f"/proc/self/fd/{path}").readlink())
        return os.path.realpath(os.fsdecode(path)).startswith(self.root + os.sep)

    def _opened(
        self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any
    ) -> Any:
        writes = set("wax+") & set(mode)
        if isinstance(file, int) or not writes or not self._inside(file):
            return self._open(file, mode, buffering, *rest, **more)
        self.operation(file)
        if set("wx") & set(mode):
            self.synced.pop(os.path.realpath(os.fsdecode(file)), None)
        raw = _File(self, os.fsdecode(file), mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffer
        encoding = more.get("encoding") or (rest[0] if rest else None)
        return io.TextIOWrapper(buffer, encoding, newline=more.get("newline"))

    def _synced(self, descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        self.operation(path)
        self._fsync(descriptor)
        self.synced[path] = os.fstat(descriptor).st_size

    def _moving(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def move(source: Any, *rest: Any, **more: Any) -> Any:
            if more or isinstance(source, int):  # by descriptor: shutil.rmtree
                return real(source, *rest, **more)
            self.operation(source)
            done = real(source, *rest)
            if name != "unlink":
                before, after = (os.path.realpath(os.fsdecode(p)) for p in (source, rest[0]))
                for path in list(self.synced):
                    if path == before or path.startswith(before + os.sep):
                        self.synced[after + path[len(before) :]] = self.synced.pop(path)
            return done

        return move


class _File(io.FileIO):
    """A file whose writes are operations."""

    def __init__(self, disk: Disk, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self._disk, self._path = disk, os.path.realpath(path)

    def write(self, data: Any) -> int:
        """Write all of the data, half of it, or none."""
        view = memoryview(data).cast("B")
        self._disk.operation(self._path, lambda: super(_File, self).write(view[: len(view) // 2]))
        return super().write(view) or 0
