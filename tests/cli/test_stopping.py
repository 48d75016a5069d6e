"""SIGTERM ends a command wherever it is, with the command that goes on."""

from __future__ import annotations

import os
import signal

import pytest

from dpo_video.cli.stopping import EXIT_CODE, at_once, later


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM to catch")
def test_a_stop_that_a_library_takes_for_an_error_of_its_own_is_a_stop() -> None:
    with pytest.raises(SystemExit) as ended, at_once():
        try:
            terminate()
        except BaseException as error:
            raise OSError("Unable to load weights") from error
    assert ended.value.code == EXIT_CODE == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_errors_pass() -> None:
    with pytest.raises(OSError, match="the disk"), at_once():
        raise OSError("the disk")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM to catch")
def test_a_command_that_saves_first_is_told() -> None:
    with at_once(), later() as stopping:
        assert not stopping.is_set()
        terminate()
        assert stopping.is_set()
