"""SIGTERM ends a command anywhere and prints the command that resumes it."""

from __future__ import annotations

import os
import signal

import pytest

from dpo_video.cli.stopping import EXIT_CODE, exit_on_sigterm, stop_event


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM to catch")
def test_sigterm_that_a_library_turns_into_its_own_error_still_exits_with_143() -> None:
    with pytest.raises(SystemExit) as ended, exit_on_sigterm():
        try:
            terminate()
        except BaseException as error:
            raise OSError("Unable to load weights") from error
    assert ended.value.code == EXIT_CODE == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_errors_are_not_caught() -> None:
    with pytest.raises(OSError, match="the disk"), exit_on_sigterm():
        raise OSError("the disk")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM to catch")
def test_stop_event_is_set_by_sigterm() -> None:
    with exit_on_sigterm(), stop_event() as stopping:
        assert not stopping.is_set()
        terminate()
        assert stopping.is_set()
