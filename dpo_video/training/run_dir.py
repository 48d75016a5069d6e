"""A run's folder: its log and its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from dpo_video.errors import RunError, first_fault
from dpo_video.registry import local
from dpo_video.support.atomic import write_bytes
from dpo_video.support.reading import read_bytes
from dpo_video.support.report import StepReport
from dpo_video.text import command

MAX_LOG = 1 << 30  # bytes
LATEST, LOG = "latest", "log.jsonl"
START = "start"
"""Folder of the LoRA that a run started from (`train.init_from`), in PEFT's format."""
_STEP = re.compile(r"step_[0-9]{6,12}")  # no path to another folder


def resume_command(out: Path) -> str:
    """The command that resumes a run, which allows the code of its strategies if it keeps some."""
    code = ["--allow-code"] if (out / local.FOLDER).is_dir() else []
    return command("train", "--out", out, "--resume", *code)


def checkpoint_folder(out: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return out / "checkpoints" / f"step_{step:06d}"


def latest_checkpoint(out: Path) -> Path:
    """The newest checkpoint of a run: the one that `latest` names, or else that of the last step.

    Raises:
        RunError: if there is none.
    """
    found = resumable(out)
    if not found:
        raise RunError(f"'{out}' has no checkpoint yet. Train it first: {resume_command(out)}")
    return found[0]


def resumable(out: Path) -> list[Path]:
    """Checkpoints to resume from, the first choice first, without a check of their files.

    `latest` names the first one; it may name an earlier one than the newest on purpose, and then
    those after it are left out. Without it, as in a partial copy, the newest is first.
    """
    found = checkpoints(out)
    pointer = out / "checkpoints" / LATEST
    name = ""
    if pointer.is_file():
        name = pointer.read_bytes()[:100].decode(errors="replace").strip()
    folders = list(found.values())
    names = [folder.name for folder in folders]
    if name in names:
        folders = folders[: names.index(name) + 1]
    return folders[::-1]


def checkpoints(run: Path) -> dict[int, Path]:
    """A run's checkpoints by step, in order."""
    found = (run / "checkpoints").glob("step_*/adapter")
    folders = [path.parent for path in found if _STEP.fullmatch(path.parent.name)]
    return dict(sorted((step_of(folder), folder) for folder in folders))


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


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
    except OSError as error:
        raise RunError(
            f"'{path}' cannot be read ({error.strerror}). Delete it to continue without training "
            "curves."
        ) from error
    reports = []
    for number, line in enumerate(lines, start=1):
        try:
            reports.append(StepReport.model_validate_json(line))
        except ValidationError as error:
            raise RunError(
                f"Line {number} of '{path}' is not the report of a step ({first_fault(error)}). "
                "Delete that line to continue without its point in the training curves."
            ) from error
    return reports


def truncate_log(path: Path, steps: int) -> None:
    """Keep the reports of the steps up to a checkpoint.

    A log that was deleted once, to continue without it, begins at a later step.
    """
    if path.exists():
        lines = path.read_bytes().split(b"\n")[:-1]  # the last one is incomplete or empty
        reports = read_log(path.parent)
        kept = [line for line, each in zip(lines, reports, strict=True) if each.step <= steps]
        write_bytes(path, b"".join(line + b"\n" for line in kept))
