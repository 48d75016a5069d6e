"""`dpo-video train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from dpo_video.cli.console import BOLD, say
from dpo_video.cli.options import TRAINING, option, takes
from dpo_video.cli.stopping import exit_resumable, stop_event
from dpo_video.text import command


@takes(*TRAINING)
def train(
    options: dict[str, Any],
    out: Annotated[
        Path | None, option("--out", "Folder of the run; by default runs/PAIRS-LOSS.")
    ] = None,
    resume: Annotated[bool, option("--resume", "Resume the run in --out.")] = False,
    auto_resume: Annotated[
        bool, option("--auto-resume", "Resume the run in --out if there is one, else start it.")
    ] = False,
) -> None:
    """Build pairs if necessary, and train an adapter on them.

    Repeat a run with --config runs/NAME/run.toml; resume one with --out runs/NAME --resume. Use
    --auto-resume on preemptible machines and with launchers that restart processes: the same
    command starts the run and resumes it. On SIGTERM it saves a checkpoint, prints the resume
    command and exits with status 143.
    """
    from dpo_video.cli.display import TerminalProgress, verdict_text
    from dpo_video.workflows.runs import verdict_of
    from dpo_video.workflows.train import train

    with stop_event() as stopping, TerminalProgress() as progress:
        run = train(
            **options,
            out=out,
            resume=resume,
            auto_resume=auto_resume,
            progress=progress,
            stop=stopping.is_set,
        )
    if run.stopped:
        at = (
            f"Stopped and saved at step {run.new_reports[-1].step}."
            if run.new_reports
            else "Stopped."
        )
        exit_resumable(command("train", "--out", run.folder, "--resume"), at)
    if (verdict := verdict_of(run.new_reports)) is None:
        say(f"'{run.folder}' already has all its steps. Train longer with --steps.")
    else:
        say(verdict_text(verdict))
    say("Compare it with the base: ", (command("evaluate", run.folder), BOLD))
