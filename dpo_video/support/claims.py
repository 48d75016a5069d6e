"""One writer a folder: a lock that names its holder and ends with its process.

The lock is the system's (flock, on Windows msvcrt.locking), which ends with the process however it
dies, and which NFS and most cluster file systems pass on to other machines. Some mounts keep it to
one machine, or have none. There the heartbeat decides: the holder rewrites its record every few
seconds, and a record of another machine is overwritten only after it has stopped changing. No
clocks are compared.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dpo_video.errors import BusyError, UserError
from dpo_video.support.atomic import writing
from dpo_video.support.reading import read_bytes
from dpo_video.text import quoted, without_credentials

WRITER = ".writer"
"""Name of a folder's lock file."""
BEAT = 5.0  # seconds between two heartbeats
SILENCE = 20.0  # seconds without a heartbeat after which a holder on another machine is dead
_POLL = 0.2  # seconds
_LONGEST = 500  # characters of a command in a message
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_OPEN: set[int] = set()
# A link would have the record written to another file.
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

if sys.platform == "win32":
    import msvcrt

    def _system_lock(descriptor: int, shared: bool) -> None:
        if not shared:  # Windows has no shared lock; a far byte leaves the record readable
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _system_lock(descriptor: int, shared: bool) -> None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)

    def _close_inherited() -> None:  # a forked helper must not keep a dead process's lock
        for descriptor in _OPEN:
            os.close(descriptor)
        _OPEN.clear()

    os.register_at_fork(after_in_child=_close_inherited)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock, as its file says."""

    host: str
    pid: int
    command: str
    since: str
    shared: bool = False
    """Whether other parts of the same work may run beside it."""
    beat: int = 0
    """Number of the heartbeat."""

    @classmethod
    def this_process(cls, *, shared: bool) -> Holder:
        """The running process."""
        program = Path(sys.argv[0]).name
        if program == "__main__.py":
            program = "dpo-video"
        # The file can be read by others, so it holds no credentials of a URL.
        command = without_credentials(" ".join(map(quoted, [program, *sys.argv[1:]])))
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            command=command[:_LONGEST],
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            shared=shared,
        )

    def __str__(self) -> str:
        return f"`{self.command}` (process {self.pid} on {self.host}, since {self.since})"


_UNKNOWN = Holder(host="an unknown host", pid=0, command="another command", since="an unknown time")


@contextmanager
def claim(
    folder: Path,
    name: str = WRITER,
    *,
    part: tuple[int, int] = (0, 1),
    instead: str = "",
    patience: float = 0.0,
    note: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[bool]:
    """Be the only writer of a folder, which is created; yields False if `stop` ended the wait.

    The folder is removed again if it was created and nothing was written to it.

    Args:
        folder: The folder.
        name: Name of the lock file in it; several names allow several writers.
        part: Number and count of processes that share the work: each holds its own part, and none
            of them runs beside a process that does all of the work.
        instead: What else can be done, for the message: "name another folder with --out".
        patience: Seconds to wait for another holder.
        note: Receives a sentence before a wait.
        stop: Ends the wait once it is true.

    Raises:
        BusyError: if another process holds the lock; the message names it.
    """
    number, count = part
    with ExitStack() as stack:
        with writing(folder):
            created = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
        if created:
            stack.callback(_remove_if_empty, folder)
        names = {name: count > 1}
        if count > 1:
            names[f"{name}-{number + 1}-of-{count}"] = False
        end, noted = time.monotonic() + patience, False
        for each, shared in names.items():
            while isinstance(held := _take(folder / each, shared, note), Holder):
                if time.monotonic() >= end:
                    further = f", or {instead}" if instead else ""
                    raise BusyError(
                        f"'{folder}' is being written by {held}. Wait until it ends or stop "
                        f"it{further}."
                    )
                if not noted:
                    note(f"Waiting for '{folder}', which is being written by {held}.")
                    noted = True
                if stop():
                    yield False
                    return
                time.sleep(_POLL)
            stack.callback(held.release)
        if count == 1:  # killed workers leave theirs; living ones hold `name` too
            for left in folder.glob(f"{glob.escape(name)}-*-of-*"):
                left.unlink(missing_ok=True)
        yield True


@dataclass
class _Lock:
    """A lock that this process holds."""

    path: Path
    descriptor: int
    holder: Holder

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beating.start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self.holder = replace(self.holder, beat=self.holder.beat + 1)
            with suppress(OSError):  # a full disk: the system's lock still holds
                _write(self.descriptor, self.holder)

    def release(self) -> None:
        """Give it up; the last holder deletes the file."""
        self._ended.set()
        self._beating.join()
        alone = True
        if self.holder.shared:
            try:
                _system_lock(self.descriptor, False)
            except OSError:
                alone = False
        with suppress(OSError):
            if alone and os.name == "posix":
                self.path.unlink()
        _OPEN.discard(self.descriptor)
        os.close(self.descriptor)
        with suppress(OSError):
            if alone and os.name != "posix":  # Windows deletes no open file
                self.path.unlink()


def _take(path: Path, shared: bool, note: Callable[[str], None]) -> _Lock | Holder:
    """The lock, or who holds it."""
    while True:
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, _FLAGS, 0o666)
            except FileNotFoundError:  # its last writer has just removed the empty folder
                continue
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise _strange(path) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _strange(path)
        system = True
        try:
            _system_lock(descriptor, shared)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                found = _read(path)
                os.close(descriptor)
                return found or _UNKNOWN
            system = False
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # the last holder has deleted this file meanwhile
    mine = Holder.this_process(shared=shared)
    found = _read(path)
    if found is None and os.fstat(descriptor).st_size:  # read while it was written
        time.sleep(_POLL)
        found = _read(path)
    apart = found is not None and (not system or found.host != mine.host)
    if found and apart and not (shared and found.shared) and _beats(path, found, note):
        os.close(descriptor)
        return found
    try:
        with writing(path.parent):
            _write(descriptor, mine)
    except BaseException:
        os.close(descriptor)
        raise
    if not system:  # of two that have started at once, the later one stays
        time.sleep(1.0)
        if (found := _read(path)) and (found.host, found.pid) != (mine.host, mine.pid):
            os.close(descriptor)
            return found
    _OPEN.add(descriptor)
    return _Lock(path, descriptor, mine)


def _beats(path: Path, before: Holder, note: Callable[[str], None]) -> bool:
    """Whether a holder whose lock the system does not show still changes its record."""
    note(f"Looking for {SILENCE:.0f} s whether {before} is still writing '{path.parent}'.")
    end = time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(_POLL)
        if (found := _read(path)) is not None and found != before:
            return True
    return False


def _write(descriptor: int, holder: Holder) -> None:
    data = json.dumps(asdict(holder)).encode() + b"\n"
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, data)
    os.truncate(descriptor, len(data))
    os.fsync(descriptor)  # other machines see what is on the disk


def _read(path: Path) -> Holder | None:
    """What the file says; None if it is empty, torn or gone."""
    try:
        return Holder(**json.loads(read_bytes(path)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _strange(path: Path) -> UserError:
    return UserError(f"'{path}' is a link or a device, not a lock file. Delete it and run again.")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
