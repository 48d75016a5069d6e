"""What is in TensorBoard's and wandb's files, and what trackio is called with."""

from __future__ import annotations

import inspect
import io
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import TrackioTracker
from PIL import Image
from small_animatediff import load_small
from small_training import SETTINGS, make_store, run

from dpo_video.testing import small_videos
from dpo_video.training import trackers
from dpo_video.workflows import session
from dpo_video.workflows.config import Config, resolve

PROMPT = "a red square moving left slowly"


def config(*assignments: str) -> Config:
    return resolve(metrics=["frame_difference"], assignments=["run.device=cpu", *assignments])


def trained(small_folder: Path, tmp_path: Path, *assignments: str) -> Accelerator:
    """A run of two steps with a validation video, reported as a command would."""
    store = make_store(tmp_path / "pairs", load_small(small_folder))
    folder, chosen = tmp_path / "my run", config(*assignments)
    accelerator = session.accelerator_for(chosen, folder)
    session.start_trackers(accelerator, chosen, folder)
    settings = SETTINGS.model_copy(update={"steps": 2, "validation_videos": 1})
    run(small_folder, store, folder, settings, accelerator=accelerator)
    trackers.log_text(accelerator, "diagnosis", "healthy: all is well.", step=2)
    accelerator.end_training()
    return accelerator


def test_tensorboard_shows_videos_configuration_and_diagnosis(
    small_folder: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(small_folder, tmp_path, "loss.beta=123.0")
    folder, values = tmp_path / "my run", {"evaluation/warp_error/tuned": 2.5}
    trackers.log_evaluation("tensorboard", folder, "", "", text="Improved.", values=values, step=2)
    logged = EventAccumulator(str(tmp_path / "my run" / trackers.TENSORBOARD))
    logged.Reload()
    (shown,) = logged.Images("validation/00")
    gif = Image.open(io.BytesIO(shown.encoded_image_string))
    assert (shown.step, gif.format, gif.n_frames) == (2, "GIF", 4)
    assert gif.size == (shown.width, shown.height)

    def text(tag: str) -> str:
        (event,) = logged.Tensors(f"{tag}/text_summary")
        return b"".join(event.tensor_proto.string_val).decode()

    assert "beta = 123.0" in text("run.toml")
    assert text("validation/00/prompt") == PROMPT
    assert text("diagnosis") == "healthy: all is well."
    assert text("evaluation") == "Improved."
    (number,) = logged.Scalars("evaluation/warp_error/tuned")
    assert (number.step, number.value) == (2, 2.5)


def stored_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a log of LevelDB's format after a header of 7 bytes."""
    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # no record begins so close to the end of a block
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_has_them_in_a_run_without_network(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    trained(
        small_folder, tmp_path, "loss.beta=123.0", "train.report_to=wandb",
        "train.project=clouds", "train.run_name=first",
    )  # fmt: skip
    (file,) = (tmp_path / "my run").glob("wandb/offline-run-*/*.wandb")
    records = [Record.FromString(data) for data in stored_records(file)]
    (first,) = (each.run for each in records if each.WhichOneof("record_type") == "run")
    assert (first.project, first.display_name) == ("clouds", "first")
    assert first.run_id == (tmp_path / "my run" / "tracker_id.txt").read_text().strip()
    values = [
        item.value_json
        for each in records
        for item in (*each.config.update, *each.run.config.update)
    ]
    assert any(json.loads(value).get("beta") == 123.0 for value in values)
    shown = {
        item.nested_key[-1]: json.loads(item.value_json)
        for each in records
        for item in each.history.item
        if item.nested_key[:1] == ["validation/00"]
    }
    assert (shown["_type"], shown["caption"]) == ("video-file", PROMPT)
    (alert,) = (each.alert for each in records if each.WhichOneof("record_type") == "alert")
    assert (alert.title, alert.text) == ("diagnosis", "healthy: all is well.")
    assert list((tmp_path / "my run").glob("wandb/offline-run-*/files/media/videos/**/*.mp4"))


class Recorded(ModuleType):
    """trackio with the signatures of version 0.43, which records its calls."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.AlertLevel = SimpleNamespace(INFO="info", WARN="warn", ERROR="error")
        update = self._recording("config", lambda values, allow_val_change=False: None)
        self.config = SimpleNamespace(update=update)
        self.Video = self._recording(
            "Video", lambda value=None, caption=None, fps=None, format=None: None
        )

        def opened(
            project, name=None, group=None, space_id=None, server_url=None, dataset_id=None,
            bucket_id=None, config=None, resume="never", settings=None, private=None, embed=True,
        ):  # fmt: skip
            return SimpleNamespace(
                log=self._recording("log", lambda metrics, step=None: None),
                alert=self._recording(
                    "alert",
                    lambda title, text=None, level="warn", step=None, webhook_url=None: None,
                ),
                finish=self._recording("finish", lambda: None),
            )

        self.init = self._recording("init", opened)

    def _recording(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def called(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options)
            self.calls.append((name, dict(bound.arguments)))
            return function(*arguments, **options)

        return called


def test_trackio_gets_project_name_configuration_videos_and_alerts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Recorded()
    monkeypatch.setitem(sys.modules, "trackio", fake)

    def init(project: str, values: dict[str, Any], options: dict[str, dict[str, Any]]) -> None:
        tracker = TrackioTracker(project, **options["trackio"])
        tracker.start()
        tracker.store_init_configuration(values)
        accelerator.trackers.append(tracker)

    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "init_trackers", init)
    chosen = config("train.report_to=trackio", "train.project=clouds")
    session.start_trackers(accelerator, chosen, tmp_path / "first", resumed=True)
    (video,) = small_videos(1, 4, 16, 16)
    path = tmp_path / "00.mp4"
    trackers.log_video(accelerator, "validation/00", path, video, fps=8.0, caption=PROMPT, step=2)
    trackers.log_text(accelerator, "diagnosis", "diverged.", step=3, alert=True)
    names = [name for name, _ in fake.calls]
    assert names == ["init", "config", "Video", "log", "alert"]
    given = dict(fake.calls)
    assert given["init"] == {"project": "clouds", "name": "first", "resume": "allow"}
    assert given["config"]["values"] == chosen.tables
    assert given["Video"] == {"value": str(path), "caption": PROMPT}
    assert given["log"]["step"] == 2 and list(given["log"]["metrics"]) == ["validation/00"]
    assert given["alert"] == {"title": "diagnosis", "text": "diverged.", "level": "warn"}


def test_an_evaluation_goes_to_the_run_of_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Recorded()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    trackers.log_evaluation(
        "trackio", tmp_path, "clouds", "first", text="Improved.", values={"a": 1.0}, step=3
    )
    assert [name for name, _ in fake.calls] == ["init", "log", "alert", "finish"]
    given = dict(fake.calls)
    assert given["init"] == {"project": "clouds", "name": "first", "resume": "allow"}
    assert given["log"] == {"metrics": {"a": 1.0}} and given["alert"]["text"] == "Improved."


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_another(tmp_path: Path) -> None:
    first = trackers._run_id(tmp_path, resumed=False)
    assert trackers._run_id(tmp_path, resumed=True) == first
    assert trackers._run_id(tmp_path, resumed=False) != first
