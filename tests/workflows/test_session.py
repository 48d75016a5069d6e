"""What is told before anything is loaded: trackers, disks, and pairs of another precision."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from accelerate import Accelerator
from small_evaluation import a_training
from small_pairs import MANIFEST
from tensorboard.summary.writer import record_writer

from dpo_video.data.store import PairStore
from dpo_video.errors import StoreError, UserError
from dpo_video.strategies import VideoModel
from dpo_video.support.report import StepEvent
from dpo_video.training.listeners import TrackerLogger, saving
from dpo_video.workflows import session
from dpo_video.workflows.config import Config, resolve


def config(*assignments: str) -> Config:
    return resolve(metrics=["frame_difference"], assignments=["run.device=cpu", *assignments])


def test_a_tracker_that_is_not_installed_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=r"report_to=wandb needs .*pip install wandb"):
        session.accelerator_for(config("train.report_to=wandb"), tmp_path)
    with pytest.raises(UserError, match="report_to"):
        session.accelerator_for(config("train.report_to=nosuch"), tmp_path)


def test_tensorboard_without_a_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tracker").write_text("a file")
    accelerator = session.accelerator_for(config(), tmp_path)
    with pytest.raises(UserError, match=r"Cannot write to .* a file of that name exists"):
        session.start_trackers(accelerator, config(), tmp_path)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """The disk of TensorBoard's files is full once the list is not empty."""
    full: list[bool] = []
    write = record_writer.RecordWriter.write

    def written(self: Any, data: bytes) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", written)
    yield full
    full.clear()


def test_tensorboard_on_a_full_disk_is_one_sentence_with_the_next_step(
    tmp_path: Path, full_disk: list[bool], capfd: pytest.CaptureFixture[str]
) -> None:
    accelerator = session.accelerator_for(config(), tmp_path)
    session.start_trackers(accelerator, config(), tmp_path)
    event = StepEvent(report=a_training(1)[0], checkpoint=None)
    logger, run = TrackerLogger(), tmp_path / "run [b]"
    logger.run = SimpleNamespace(accelerator=accelerator, out=run)  # type: ignore[assignment]
    full_disk.append(True)
    with pytest.raises(UserError, match="the disk is full") as caught:
        log_until_told(logger, event, accelerator, run)
    assert f"dpo-video train --out '{run}' --resume" in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err  # of the writer's thread


def log_until_told(
    logger: TrackerLogger, event: StepEvent, accelerator: Accelerator, run: Path
) -> None:
    """Another thread writes; its error is raised at a later call, at the latest at the end."""
    for _ in range(1000):
        logger.on_step_end(event)
    with saving(run):
        accelerator.end_training()


def test_pairs_of_another_precision_are_told_so(tmp_path: Path) -> None:
    store = PairStore.create(tmp_path / "pairs", MANIFEST)
    model = Mock(spec=VideoModel, identity="4567", latent_shape=MANIFEST.latent_shape)
    with pytest.raises(StoreError, match=r"mixed_precision=no, .* has train\.mixed_precision=bf16"):
        session.check_pairs(config("train.mixed_precision=bf16"), store, model)
    with pytest.raises(StoreError, match="made with other weights"):
        session.check_pairs(config(), store, model)
    model.identity = MANIFEST.identity
    session.check_pairs(config("train.mixed_precision=bf16"), store, model)
