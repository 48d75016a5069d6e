"""The terminal's lines on the state of a training."""

from __future__ import annotations

import pytest
from small_evaluation import a_training

from dpo_video.cli import display
from dpo_video.support.report import StepEvent
from dpo_video.training.diagnosis import TrainingState, TrainingVerdict


def printed(states: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is printed while a run has these states: . too early, h healthy, r, d."""
    named = {
        ".": TrainingState.TOO_EARLY,
        "h": TrainingState.HEALTHY,
        "r": TrainingState.REJECTED_DOMINANT,
        "d": TrainingState.DIVERGED,
    }
    lines: list[str] = []
    monkeypatch.setattr(display, "say", lambda text: lines.append(str(text).split(":")[0]))
    progress = display.TerminalProgress()
    with progress:
        for runs in states.split():  # one after another, as in a comparison
            for report, letter in zip(a_training(len(runs)), runs, strict=True):
                verdict = TrainingVerdict(state=named[letter], step=report.step, seen="", change="")
                progress.step(StepEvent(report=report, checkpoint=None), verdict, len(runs))
    return lines


def test_two_states_that_take_turns_are_not_printed_in_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert printed("..hrhrhrhrhrhrh", monkeypatch) == ["healthy (step 3)"]
    assert printed("..hrrrrrrh", monkeypatch) == ["healthy (step 3)", "rejected dominant (step 8)"]
    assert printed("..hhd", monkeypatch) == ["healthy (step 3)", "diverged (step 5)"]


def test_a_second_run_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed("..rrr ..rr", monkeypatch) == [
        "rejected dominant (step 3)", "rejected dominant (step 3)",
    ]  # fmt: skip
