"""A run's folder: its log and its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from dpo_video.errors import RunError, first_fault
from dpo_video.support.atomic import write_bytes
from dpo_video.support.reading import read_bytes
from dpo_video.text import command
from dpo_video.training.report import StepReport

MAX_LOG = 1 << 30  # bytes
LATEST, LOG = "latest", "log.jsonl"
_STEP = re.compile(r"step_[0-9]{6,12}")  # no path to another folder


def checkpoint_folder(out: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return out / "checkpoints" / f"step_{step:06d}"


def latest_checkpoint(out: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        RunError: if there is none.
    """
    pointer = out / "checkpoints" / LATEST
    if not pointer.is_file():
        raise RunError(
            f"'{out}' has no checkpoint yet. Train it first: "
            f"{command('train', '--out', out, '--resume')}"
        )
    name = pointer.read_bytes()[:100].decode(errors="replace").strip()
    folder = pointer.parent / name
    if not (_STEP.fullmatch(name) and (folder / "state.safetensors").is_file()):
        raise RunError(
            f"'{pointer}' names '{folder.name}', which holds no checkpoint. Write the name of "
            "another folder beside it to that file, or train again."
        )
    return folder


def checkpoints(run: Path) -> dict[int, Path]:
    """A run's checkpoints by step, in order."""
    found = (run / "checkpoints").glob("step_*/adapter")
    folders = [path.parent for path in found if _STEP.fullmatch(path.parent.name)]
    return dict(sorted((int(folder.name.removeprefix("step_")), folder) for folder in folders))


def checkpoint_at(run: Path, step: int | None) -> Path:
    """A run's checkpoint of a step, or the newest one if `step` is None.

    Raises:
        RunError: if there is none.
    """
    latest = latest_checkpoint(run)
    if step is None:
        return latest
    folder = checkpoints(run).get(step)
    if folder is None:
        raise RunError(
            f"'{run}' has no checkpoint of step {step}. It has those of "
            f"{', '.join(map(str, checkpoints(run)))}."
        )
    return folder


def read_log(out: Path) -> list[StepReport]:
    """Reports of a run's steps so far.

    Raises:
        RunError: if the log is damaged.
    """
    path = out / LOG
    if not path.exists():
        return []
    # What follows the last line break was not written completely.
    try:
        lines = read_bytes(path, MAX_LOG).split(b"\n")[:-1]
        return [StepReport.model_validate_json(line) for line in lines]
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_fault(error)
        raise RunError(
            f"'{path}' cannot be read ({reason}). Delete it to continue without training curves."
        ) from error


def truncate_log(path: Path, steps: int) -> None:
    """Keep the first lines of a log, those of the steps up to a checkpoint."""
    if path.exists():
        lines = path.read_bytes().split(b"\n")[:-1]  # the last one is incomplete or empty
        write_bytes(path, b"".join(line + b"\n" for line in lines[:steps]))
