"""Tests of the installed package: run `pytest` in this folder."""

from __future__ import annotations

import torch
from dpo_video_exposure import Exposure

from dpo_video.testing import check_labeler


def test_it_keeps_the_contract() -> None:
    check_labeler(Exposure())
    check_labeler(Exposure(tie=0.0))


def test_it_counts_clipped_pixels_by_segment() -> None:
    """Four frames of four grey pixels; half of the first frame of the first video is clipped."""
    grey = torch.full((1, 3, 4, 2, 2), 0.5)
    clipped = grey.clone()
    clipped[:, :, 0, 0] = torch.tensor([0.0, 1.0])
    clipped[:, :2, 3] = 1.0  # yellow: one channel is not
    result = Exposure().judge(["a"], clipped, grey, [slice(0, 2), slice(2, 4)])
    assert result.labels.tolist() == [[-1.0, 0.0]]
    assert result.notes == ["clipped: 12.5% of the first, 0.0% of the second"]
    assert Exposure(tie=0.25).judge(["a"], clipped, grey, [slice(0, 2)]).labels.tolist() == [[0.0]]
