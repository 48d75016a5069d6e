"""Ctrl-C, SIGTERM and SIGHUP end a command anywhere and print the command that resumes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dpo_video.cli.stopping import exit_on_signal
from dpo_video.support.interrupts import NUMBERS, StopSignal, deferred, raised

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has none of these to catch")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_that_a_library_turns_into_its_own_error_still_ends_the_command(
    number: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dpo-video", "build", "--out=a b"])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, exit_on_signal():
        try:
            send(number)
        except BaseException as error:
            raise OSError("Unable to load weights") from error
    assert ended.value.code == CODES[signal.Signals(number)]
    assert signal.getsignal(number) is before
    assert "Stopped. Resume with: dpo-video build '--out=a b'" in capfd.readouterr().err


def test_other_errors_are_not_caught() -> None:
    with pytest.raises(OSError, match="the disk"), exit_on_signal():
        raise OSError("the disk")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_deferred_signal_is_raised_after_the_body(number: int) -> None:
    steps = []
    with pytest.raises(SystemExit) as ended, exit_on_signal(), deferred() as stopping:
        assert not stopping()
        send(number)
        assert stopping()
        if number != signal.SIGINT:
            send(number)  # a machine may send it again
        steps.append("saved")
    assert steps == ["saved"] and ended.value.code == CODES[signal.Signals(number)]


def test_outside_a_command_ctrl_c_is_a_keyboard_interrupt_after_saving() -> None:
    with pytest.raises(KeyboardInterrupt), deferred() as stopping:
        send(signal.SIGINT)
        assert stopping()


def test_an_error_while_saving_is_not_hidden_by_the_signal() -> None:
    with pytest.raises(OSError, match="full"), deferred():
        send(signal.SIGINT)
        raise OSError("full")


def test_an_ignored_signal_stays_ignored() -> None:  # nohup
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exit_on_signal(), deferred() as stopping:
            send(signal.SIGHUP)
            assert not stopping()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_are_left_alone() -> None:
    found: list[bool] = []

    def body() -> None:
        with deferred() as stopping:
            found.append(stopping())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [False]


def test_the_message_can_say_what_was_saved(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_on_signal():
        stop = StopSignal(signal.SIGTERM)
        stop.done, stop.command = "Saved at step 3.", "dpo-video train --out run --resume"
        raise stop
    assert capfd.readouterr().err == (
        "Saved at step 3. Resume with: dpo-video train --out run --resume\n"
    )


TWICE = """
import os, signal, sys
from dpo_video.cli.stopping import exit_on_signal
from dpo_video.support.interrupts import deferred
with exit_on_signal(), deferred():
    os.kill(os.getpid(), signal.SIGINT)
    print("saving", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("saved", flush=True)
"""


@pytest.mark.parametrize(
    ("environment", "printed"),
    [({}, "saving\n"), ({"WORLD_SIZE": "2"}, "saving\nsaved\n")],
    ids=["Ctrl-C twice", "Ctrl-C, passed on by a launcher"],
)
def test_a_second_ctrl_c_ends_at_once(environment: dict[str, str], printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWICE], env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, printed), done.stderr


CLOSED = """
import time
from dpo_video.cli.stopping import exit_on_signal
from dpo_video.support.interrupts import deferred
with exit_on_signal(), deferred() as stopping:
    print("ready", flush=True)
    while not stopping():
        time.sleep(0.01)
    print("saved", flush=True)
"""


def test_a_closed_terminal_does_not_break_the_saving() -> None:
    import pty

    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", CLOSED])
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_drops_is_sent_again(number: signal.Signals) -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(number)

    with pytest.raises(StopSignal) as stopped, raised():
        Dying()  # what is raised in __del__ is dropped
        time.sleep(5)
        pytest.fail("the signal was lost")
    assert stopped.value.number == number
