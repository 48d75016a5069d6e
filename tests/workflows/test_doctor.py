"""The examination of an installation."""

from __future__ import annotations

import pytest
from conftest import Install, Said

from dpo_video.errors import UserError
from dpo_video.workflows.doctor import doctor

SOURCE = """
from dpo_video.plugin import Loss, LossOutput, PairErrors, clip_loss

class Right(Loss):
    "Global DPO again."
    def __call__(self, errors: PairErrors) -> LossOutput:
        "The loss."
        return clip_loss(errors, 2500.0)

class Wrong(Loss):
    "Returns a number."
    def __call__(self, errors: PairErrors) -> LossOutput:
        "The loss."
        return 1.0
"""


def test_what_is_broken_hidden_or_of_no_group_is_told(install: Install, said: Said) -> None:
    install("dpo-right", SOURCE, "region", "Right")
    install("dpo-gone", "import nothing_like_this\n", "gone", "Gone")
    install("dpo-plural", SOURCE, "right", "Right", "losses")
    found = {each.what: each for each in doctor().findings}
    assert found["torch"].detail and not found["torch"].fault
    assert "hidden by the built-in" in found["loss dpo-right:region"].detail
    assert "No module named 'nothing_like_this'" in found["loss dpo-gone:gone"].fault
    assert "'dpo_video.losses', which does not exist" in found["plugin"].fault
    said(1, "doctor")


def test_contracts_are_run_on_request(install: Install, said: Said) -> None:
    install("dpo-right", SOURCE, "right", "Right")
    (loaded, kept) = doctor("dpo-right", contracts=True).findings
    assert not loaded.fault and kept.detail == "kept"
    said(0, "doctor", "dpo-right", "--contracts")
    install("dpo-wrong", SOURCE, "wrong", "Wrong")
    (fault,) = doctor("dpo-wrong", contracts=True).faults
    assert fault.what == "loss dpo-wrong:wrong: contract" and "float" in fault.fault
    with pytest.raises(UserError, match=r"Unknown package 'dpo-rihgt'.*'dpo-right'"):
        doctor("dpo-rihgt")
