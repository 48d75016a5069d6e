"""A folder has one writer, whose lock ends with its process."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_video.errors import BusyError, UserError
from dpo_video.support import claims
from dpo_video.support.claims import WRITER, Holder, claim

HOLD = """
import sys, time
from pathlib import Path
from dpo_video.support.claims import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.05)
    monkeypatch.setattr(claims, "SILENCE", 0.5)
    monkeypatch.setattr(claims, "_POLL", 0.01)


def record_of(path: Path, **fields: object) -> Holder:
    """Leave a record as another process would."""
    holder = replace(Holder.this_process(shared=False), **fields)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    claims._write(descriptor, holder)  # in place: it is never empty in between
    os.close(descriptor)
    return holder


def test_the_second_writer_is_told_who_the_first_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/dpo-video", "train", "--out=a b"])
    told = (
        rf"'{tmp_path}/run' is being written by `dpo-video train '--out=a b'` "
        rf"\(process {os.getpid()} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\)\. Wait until "
        r"it ends or stop it, or name another\.$"
    )
    with claim(tmp_path / "run"):
        with pytest.raises(BusyError, match=told), claim(tmp_path / "run", instead="name another"):
            pytest.fail("two writers")
        with claim(tmp_path / "run", "other"):
            pass  # another name is another lock
    with claim(tmp_path / "run"):
        pass


def test_nothing_is_left_where_nothing_was_written(tmp_path: Path) -> None:
    with claim(tmp_path / "new"):
        assert (tmp_path / "new" / WRITER).exists()
    assert not (tmp_path / "new").exists()
    with claim(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with claim(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").exists()  # it is the user's


def test_it_ends_with_its_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BusyError, match=f"process {process.pid}"), claim(tmp_path):
        pytest.fail("two writers")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / WRITER).exists()
    with claim(tmp_path):
        pass
    assert not (tmp_path / WRITER).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_helper_does_not_keep_it(tmp_path: Path) -> None:
    ended, end = os.pipe()
    with claim(tmp_path):
        if not (child := os.fork()):
            os.close(end)
            os.read(ended, 1)
            os._exit(0)
        (descriptor,) = claims._OPEN
        os.close(os.dup(descriptor))
    with claim(tmp_path):  # although the child lives
        pass
    os.close(end)
    os.waitpid(child, 0)
    os.close(ended)


def test_parts_of_one_work_run_together_and_beside_nothing_else(tmp_path: Path) -> None:
    with claim(tmp_path, part=(0, 2)):
        with claim(tmp_path, part=(1, 2)):
            pass
        with pytest.raises(BusyError), claim(tmp_path, part=(0, 2)):
            pytest.fail("the same part twice")
        with pytest.raises(BusyError), claim(tmp_path):
            pytest.fail("a part and the whole")
    with claim(tmp_path), pytest.raises(BusyError), claim(tmp_path, part=(0, 2)):
        pytest.fail("the whole and a part")
    assert not list(tmp_path.iterdir())


def test_the_whole_deletes_the_locks_of_killed_parts(tmp_path: Path) -> None:
    with claim(tmp_path, part=(0, 2)):
        record_of(tmp_path / f"{WRITER}-2-of-2", pid=2**22)
    assert [path.name for path in tmp_path.iterdir()] == [f"{WRITER}-2-of-2"]
    with claim(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [WRITER]


def in_thread(held: threading.Event, end: threading.Event, folder: Path) -> threading.Thread:
    def hold() -> None:
        with claim(folder):
            held.set()
            end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    return thread


def test_a_wait_is_announced_and_can_be_stopped(tmp_path: Path) -> None:
    held, end, said = threading.Event(), threading.Event(), list[str]()
    thread = in_thread(held, end, tmp_path)
    asked = iter([False, False, True])
    with claim(
        tmp_path, patience=float("inf"), note=said.append, stop=lambda: next(asked)
    ) as claimed:
        assert not claimed
    assert len(said) == 1 and said[0].startswith(f"Waiting for '{tmp_path}'")
    end.set()
    with claim(tmp_path, patience=60) as claimed:
        assert claimed
    thread.join()


def test_the_record_holds_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = ["s3://id:secret@bucket/p", "https://host/p?token=secret&x=1"]
    monkeypatch.setattr(sys, "argv", ["/x/dpo_video/__main__.py", "train", *urls])
    command = Holder.this_process(shared=False).command
    assert command == "dpo-video train s3://bucket/p 'https://host/p'"


# --- disks whose locks do not reach other machines --------------------------------------------


def test_a_silent_holder_on_another_machine_is_dead(tmp_path: Path) -> None:
    record_of(tmp_path / WRITER, host="elsewhere", pid=7)
    said: list[str] = []
    with claim(tmp_path, note=said.append):
        assert json.loads((tmp_path / WRITER).read_text())["pid"] == os.getpid()
    assert "process 7 on elsewhere" in said[0]


def test_a_beating_one_is_alive(tmp_path: Path) -> None:
    ended = threading.Event()

    def beat() -> None:
        for number in range(10**6):
            record_of(tmp_path / WRITER, host="elsewhere", pid=7, beat=number)
            if ended.wait(0.05):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        while not (tmp_path / WRITER).exists():
            time.sleep(0.01)
        with pytest.raises(BusyError, match="process 7 on elsewhere"), claim(tmp_path):
            pytest.fail("two writers")
    finally:
        ended.set()
        thread.join()


def test_without_any_locks_the_heartbeat_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int, shared: bool) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(claims, "_system_lock", none)
    held, end = threading.Event(), threading.Event()
    thread = in_thread(held, end, tmp_path)
    with pytest.raises(BusyError, match=f"process {os.getpid()}"), claim(tmp_path):
        pytest.fail("two writers")
    end.set()
    thread.join()
    with claim(tmp_path):
        pass


@pytest.mark.parametrize("torn", ["", '{"host": "a"', "[" * 10**5, '{"unknown": 1}', "[]", "1"])
def test_a_torn_record_is_nobodys(tmp_path: Path, torn: str) -> None:
    (tmp_path / WRITER).write_text(torn)
    with claim(tmp_path):
        pass


@pytest.mark.skipif(os.name != "posix", reason="made of links and pipes")
@pytest.mark.parametrize("kind", ["a link", "a pipe"])
def test_a_strangers_lock_file_leads_to_no_other_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("mine")
    path = tmp_path / "run" / WRITER
    path.symlink_to(tmp_path / "precious") if kind == "a link" else os.mkfifo(path)
    with pytest.raises(UserError, match=r"not a lock file\. Delete it"), claim(tmp_path / "run"):
        pytest.fail("it was written")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_lock_file_that_its_holder_deletes_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system: Callable[[int, bool], None] = claims._system_lock
    deleted: list[int] = []

    def lock(descriptor: int, shared: bool) -> None:
        if not deleted:  # between open and lock
            deleted.append(descriptor)
            (tmp_path / WRITER).unlink()
        system(descriptor, shared)

    monkeypatch.setattr(claims, "_system_lock", lock)
    with claim(tmp_path), pytest.raises(BusyError), claim(tmp_path):
        pytest.fail("two writers")


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(claims, "_write", full)
    with pytest.raises(UserError, match="the disk is full"), claim(tmp_path):
        pytest.fail("claimed")
    monkeypatch.undo()
    with claim(tmp_path):
        assert (tmp_path / WRITER).exists()
