"""What `dpo-video train` says before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpo_video.cli.train import _say_what_is_left_out
from dpo_video.data.store import Manifest, PairStore
from dpo_video.types import Pair

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


def test_ties_and_even_pairs_are_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    won, tied, even = [1.0, 1.0, 0.0, 0.0], [0.0] * 4, [1.0, -1.0, 0.0, 0.0]
    _say_what_is_left_out(store_of(tmp_path / "some", won, tied, even, tied))
    words = " ".join(capfd.readouterr().err.split())
    assert "2 of 4 pairs are left out: they prefer neither video in any frame." in words
    assert "1 of 4 pairs are even" in words and "(segment)" in words
    _say_what_is_left_out(store_of(tmp_path / "all", won, won))
    assert capfd.readouterr().err == ""
