"""The notes of a training before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpo_video.data.store import Manifest, PairStore
from dpo_video.errors import TrainingError
from dpo_video.loss.global_ import Global
from dpo_video.loss.sdpo import SDPO
from dpo_video.loss.segment import Segment
from dpo_video.loss.sft import SFT
from dpo_video.settings import TrainSettings
from dpo_video.types import Pair
from dpo_video.workflows.train import _left_out

SHAPE = (1, 4, 2, 2)


def store_of(folder: Path, *labels: list[float]) -> PairStore:
    manifest = Manifest(recipe={}, identity="none", latent_shape=SHAPE, fps=8.0)
    store = PairStore.create(folder, manifest)
    for preference in labels:
        pair = Pair(
            first=torch.zeros(SHAPE), second=torch.ones(SHAPE), region=torch.ones(SHAPE),
            preference=torch.tensor(preference), prompt="a", source="made",
        )  # fmt: skip
        store.append(pair, {"text": torch.zeros(1, 1)})
    return store


def test_ties_and_even_pairs_are_counted(tmp_path: Path) -> None:
    won, tied, even = [1.0, 1.0, 0.0, 0.0], [0.0] * 4, [1.0, -1.0, 0.0, 0.0]
    some = store_of(tmp_path / "some", won, tied, even, tied)
    first, second = _left_out(some, [0, 2], TrainSettings(), Global())
    assert first == "2 of 4 pairs are left out: they prefer neither video in any frame."
    assert second.startswith("1 of 4 pairs are even") and "(segment)" in second
    assert _left_out(store_of(tmp_path / "all", won, won), [0, 1], TrainSettings(), Global()) == []
    few = _left_out(some, [0], TrainSettings(min_decided=0.2), Global())
    assert few[0].startswith("1 of 4 pairs are left out: they prefer a video in no more than 20%")


def test_a_loss_without_a_preferred_video_is_refused(tmp_path: Path) -> None:
    even = store_of(tmp_path, [1.0, -1.0, 0.0, 0.0], [1.0, 1.0, -1.0, -1.0])
    for loss in (Global(), SDPO(), SFT()):
        with pytest.raises(TrainingError, match=r"All 2 pairs are even.*Use --loss segment"):
            _left_out(even, [0, 1], TrainSettings(), loss)
    (note,) = _left_out(even, [0, 1], TrainSettings(), Segment())
    assert note.startswith("2 of 2 pairs are even")
