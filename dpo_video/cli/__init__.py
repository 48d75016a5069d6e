"""The command line: one command per file. Nothing here imports torch before a command runs.

Further commands, of plugins too, are entry points of the group `dpo_video.command`: `--help` reads
their names, and one is imported when it is run.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

import dpo_video
from dpo_video.cli import (
    build,
    check,
    compare,
    config,
    doctor,
    estimate,
    evaluate,
    export,
    export_pairs,
    generate,
    label,
    new,
    pack,
    show,
    train,
)
from dpo_video.cli import list as listing
from dpo_video.cli.console import BAD, console, say
from dpo_video.errors import UserError
from dpo_video.text import help_of

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables by which a user chooses how OpenMP's threads wait."""
KIND = "command"
"""Of the entry points' group, `dpo_video.command`."""


class Commands(TyperGroup):
    """The commands of `COMMANDS`, and those of entry points."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names; of entry points those that a command of ours does not hide."""
        from dpo_video import registry

        own = super().list_commands(ctx)
        return [*own, *sorted(registry.named(KIND).keys() - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One of ours, or the name and the package of another, which is not imported."""
        if found := super().get_command(ctx, cmd_name):
            return found
        from dpo_video import registry

        if not (same := registry.named(KIND).get(cmd_name)):
            return None
        entry = same[0]
        package = "" if entry.built_in else f"(of {entry.distribution})"
        about = f"{registry.summary_of(entry)} {package}".strip()
        return TyperCommand(cmd_name, help=about, rich_markup_mode=None)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command to run; here one of an entry point is imported."""
        if args and super().get_command(ctx, args[0]) is None:
            from dpo_video import registry

            if registry.is_installed(KIND, args[0]):
                from dpo_video.registry.commands import load_command

                return args[0], load_command(args[0]), args[1:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="dpo-video",
    cls=Commands,
    help="Direct Preference Optimization for text-to-video diffusion models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "estimate": estimate.estimate,
    "evaluate": evaluate.evaluate,
    "compare": compare.compare,
    "generate": generate.generate,
    "export": export.export,
    "build": build.build,
    "label": label.label,
    "check": check.check,
    "pack": pack.pack,
    "export-pairs": export_pairs.export_pairs,
    "list": listing.list_strategies,
    "show": show.show_strategy,
    "config": config.config,
    "new": new.new,
    "doctor": doctor.doctor,
}
for _name, _command in COMMANDS.items():
    app.command(_name, help=help_of(_command))(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dpo-video {dpo_video.__version__}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    rank = os.environ.get("RANK", "0")
    console.quiet = rank.isdecimal() and 0 < int(rank) < int(os.environ.get("WORLD_SIZE", "1"))


def main() -> None:
    """Run the command line.

    A UserError is printed as one sentence and exits with code 2. Any other error keeps its
    traceback and exits with code 1; for a plugin's, a sentence names its package. SIGINT, SIGTERM
    and SIGHUP print the command that resumes the work and exit with code 130, 143 and 129.
    """
    from dpo_video.cli.stopping import exit_on_signal

    # Downloads send the name of the library only, nothing about the machine.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    _let_waiting_threads_sleep()
    try:
        with exit_on_signal():
            app()
    except UserError as error:
        _exit_with(error)
    except (Exception, SystemExit) as error:
        # No strategy runs without torch, and no command of a plugin without that module.
        if "torch" in sys.modules or "dpo_video.registry.commands" in sys.modules:
            _explain(error)
        raise


def _let_waiting_threads_sleep() -> None:
    """Let OpenMP's threads sleep between parallel operations, unless the user has chosen.

    By default they spin, which takes the time of other processes (`benchmarks/threads.py`). OpenMP
    reads this when torch is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _exit_with(error: UserError) -> NoReturn:
    _print_error(str(error))
    sys.exit(2)


def _explain(error: BaseException) -> None:
    """Exit with a sentence if an unexpected error has a known cause."""
    if "torch" in sys.modules:
        from dpo_video.support.oom import shortage
        from dpo_video.support.reproducibility import refusal

        if isinstance(error, RuntimeError) and (refused := refusal(error)):
            _exit_with(refused)
        if short := shortage(error):
            _exit_with(short)
    from dpo_video.registry.attribution import attribution

    if sentence := attribution(error):
        _print_error(sentence)
        traceback.print_exception(error)
        sys.exit(1)


def _print_error(sentence: str) -> None:
    say(("Error:", BAD), f" {sentence}", to=Console(stderr=True))
