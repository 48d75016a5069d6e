"""`dpo-video train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from dpo_video.cli.console import BOLD, say
from dpo_video.cli.options import TRAINING, option, takes
from dpo_video.cli.stopping import FROM_ANOTHER, exit_resumable


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
    accept_changes: Annotated[
        bool,
        option(
            "--accept-changes",
            "Resume with options that change what the run learns from here on.",
        ),
    ] = False,
) -> None:
    """Build pairs if necessary, and train an adapter on them.

    Repeat a run with --config runs/NAME/run.toml; resume one with --out runs/NAME --resume. Use
    --auto-resume on preemptible machines and with launchers that restart processes: the same
    command starts the run and resumes it. On Ctrl-C, SIGTERM and SIGHUP it saves a checkpoint and
    prints the resume command; a second Ctrl-C ends it at once.
    """
    from dpo_video.cli.display import TerminalProgress, verdict_text
    from dpo_video.training.run_dir import resume_command
    from dpo_video.workflows.train import train

    with TerminalProgress() as progress:
        run = train(
            **options,
            out=out,
            resume=resume,
            auto_resume=auto_resume,
            accept_changes=accept_changes,
            progress=progress,
        )
    if run.stopped:  # by a signal to another process of the run
        again = resume_command(run.folder)
        exit_resumable(again, "Stopped and saved.", FROM_ANOTHER)
    if not run.new_reports or (verdict := run.verdict) is None:
        say(f"'{run.folder}' already has all its steps. Train longer with --steps.")
    elif not progress.showed(verdict):
        say(verdict_text(verdict))
    say("Compare it with the base: ", (run.evaluate_command, BOLD))
