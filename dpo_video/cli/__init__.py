"""The command line: one command a file. Nothing here imports torch before a command runs."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

import typer
from rich.console import Console

from dpo_video.cli import (
    bench,
    build,
    check,
    compare,
    config,
    estimate,
    evaluate,
    export,
    export_pairs,
    generate,
    label,
    pack,
    show,
    train,
)
from dpo_video.cli import list as listing
from dpo_video.errors import UserError

app = typer.Typer(
    name="dpo-video",
    help="Direct Preference Optimization for text-to-video diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("train")(train.train)
app.command("estimate")(estimate.estimate)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("build")(build.build)
app.command("label")(label.label)
app.command("check")(check.check)
app.command("pack")(pack.pack)
app.command("export-pairs")(export_pairs.export_pairs)
app.command("list")(listing.list_strategies)
app.command("show")(show.show)
app.command("bench", context_settings=bench.OPEN)(bench.bench)
app.command("config")(config.config)


def main() -> None:
    """Run the command line. A UserError is one sentence and exit code 2, a bug keeps its trace.

    A plugin's bug keeps it too, below a sentence that names its package; both exit with code 1.
    SIGTERM ends it with exit code 143 and the command that goes on.
    """
    from dpo_video.cli.stopping import at_once

    # A download then says what fetches it, and nothing of the machine.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with at_once():
            app()
    except UserError as error:
        _refuse(error)
    except (Exception, SystemExit) as error:
        if "torch" in sys.modules:  # no strategy runs without it
            _explain(error)
        raise


def _refuse(error: UserError) -> NoReturn:
    _say(str(error))
    sys.exit(2)


def _explain(error: BaseException) -> None:
    """Ends the program if something is known about an error that nobody raised on purpose."""
    if isinstance(error, RuntimeError):
        from dpo_video.support.reproducibility import refusal

        if refused := refusal(error):
            _refuse(refused)
    from dpo_video.support.oom import shortage

    if short := shortage(error):
        _refuse(short)
    from dpo_video.registry.attribution import blamed

    if sentence := blamed(error):
        _say(sentence)
        traceback.print_exception(error)
        sys.exit(1)


def _say(sentence: str) -> None:
    from rich.markup import escape

    Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(sentence)}")
