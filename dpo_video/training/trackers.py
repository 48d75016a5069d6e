"""What the trackers of Accelerate get besides numbers: configuration, videos and texts.

TensorBoard shows videos as GIFs among its images, and texts. wandb and trackio have media and
alerts. Other trackers get the numbers and the configuration only.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dpo_video.data.video_writer import gif_bytes
from dpo_video.support.atomic import write_text
from dpo_video.types import Video

TENSORBOARD = "tracker"
"""Folder of TensorBoard's files in a run."""
_MEDIA = ("wandb", "trackio")
_RUN_ID = "tracker_id.txt"


def start(
    accelerator: Accelerator,
    name: str,
    *,
    folder: Path,
    project: str,
    run_name: str,
    tables: Mapping[str, Mapping[str, Any]],
    toml: str,
    resumed: bool,
) -> None:
    """Open a tracker; a resumed run goes on in the tracker's run.

    Args:
        accelerator: Made with this tracker.
        name: Its name in Accelerate.
        folder: The run's folder; local files of a tracker are written there.
        project: Name of the project.
        run_name: Name of the run in the project.
        tables: The configuration.
        toml: The same as text.
        resumed: Whether the run has steps already.
    """
    if name == "tensorboard":
        accelerator.init_trackers(TENSORBOARD)
        _text(accelerator, "run.toml", f"```toml\n{toml}\n```", 0)
        return
    options: dict[str, Any] = {}
    if name in _MEDIA:
        resume = "allow" if resumed else "never"
        options = {"name": run_name, "resume": resume}
        if name == "wandb":
            options |= {"id": _run_id(folder, resumed=resumed), "dir": str(folder)}
            options["resume"] = "allow"
    config = dict(tables) if name in _MEDIA else _flat(tables)
    accelerator.init_trackers(project, config, {name: options})


def log_video(
    accelerator: Accelerator, name: str, path: Path, video: Video, *, fps: float, caption: str,
    step: int, scale: int = 1,
) -> None:  # fmt: skip
    """Show a video that was written to `path`; call it in the main process."""
    for tracker in _trackers(accelerator):
        if tracker.name == "tensorboard":
            summary: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
            height, width = (scale * side for side in video.shape[-2:])
            image = summary.Image(
                height=height, width=width, colorspace=3,
                encoded_image_string=gif_bytes(video, fps, scale),
            )  # fmt: skip
            tracker.tracker.file_writer.add_summary(
                summary(value=[summary.Value(tag=name, image=image)]), step
            )
            _text(accelerator, f"{name}/prompt", caption, step)
        elif tracker.name in _MEDIA:
            media = importlib.import_module(tracker.name).Video
            options = {"format": "mp4"} if tracker.name == "wandb" else {}
            shown = media(str(path), caption=caption, **options)
            tracker.tracker.log({name: shown}, step=step)


def log_text(
    accelerator: Accelerator, title: str, text: str, *, step: int, alert: bool = False
) -> None:
    """Show a text: in TensorBoard among the texts, in wandb and trackio as an alert."""
    if not accelerator.is_main_process:
        return
    _text(accelerator, title, text, step)
    for tracker in _trackers(accelerator):
        if tracker.name in _MEDIA:
            levels = importlib.import_module(tracker.name).AlertLevel
            level = levels.WARN if alert else levels.INFO
            tracker.tracker.alert(title=title, text=text, level=level)


def log_evaluation(
    name: str, folder: Path, project: str, run_name: str, *, text: str,
    values: Mapping[str, float], step: int,
) -> None:  # fmt: skip
    """Add an evaluation to the tracker of a finished run; trackers without texts get none.

    Args:
        name: The tracker's name in Accelerate.
        folder: The run's folder.
        project: Name of the project.
        run_name: Name of the run in the project.
        text: The verdict.
        values: Numbers by name.
        step: The step of the checkpoint.

    Raises:
        Exception: whatever the tracker's library raises.
    """
    if name == "tensorboard":
        if not (folder / TENSORBOARD).is_dir():  # deleted, or left out of a copy
            return
        writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        with writer(folder / TENSORBOARD) as file:
            file.add_text("evaluation", text, global_step=step)
            for key, value in values.items():
                file.add_scalar(key, value, global_step=step)
    elif name in _MEDIA:
        module = importlib.import_module(name)
        options: dict[str, Any] = {"project": project, "name": run_name, "resume": "allow"}
        if name == "wandb":
            options |= {"id": _run_id(folder, resumed=True), "dir": str(folder)}
        run = module.init(**options)
        run.log(dict(values))
        run.alert(title="evaluation", text=text, level=module.AlertLevel.INFO)
        run.finish()


def _text(accelerator: Accelerator, title: str, text: str, step: int) -> None:
    for tracker in _trackers(accelerator):
        if tracker.name == "tensorboard":
            tracker.tracker.add_text(title, text, global_step=step)


def _trackers(accelerator: Accelerator) -> list[Any]:
    return accelerator.trackers if accelerator.is_main_process else []


def _run_id(folder: Path, *, resumed: bool) -> str:
    """The id of a run in wandb: a resumed run's own one."""
    path = folder / _RUN_ID
    if not (resumed and path.is_file()):
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by path, as numbers, truth values and texts."""
    found: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            found[f"{prefix}{name}"] = value if plain else str(value)
    return found
