"""`dpo-video doctor`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from dpo_video.cli.console import BAD, NAME, show, show_json
from dpo_video.cli.options import Json
from dpo_video.support.formatting import plain_table
from dpo_video.text import one_line


def doctor(
    package: Annotated[
        str | None, typer.Argument(help="A plugin's package; by default everything.")
    ] = None,
    contracts: Annotated[
        bool, typer.Option("--contracts", help="Run the contracts of plugins, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Examine the installation and its plugins; exit with status 1 if something is wrong."""
    from dpo_video.workflows.doctor import doctor as examine

    found = examine(package, contracts=contracts)
    if as_json:
        show_json(found.to_dict())
    else:
        rows = [
            (
                Text(one_line(each.what), NAME),
                Text(one_line(each.fault), BAD) if each.fault else one_line(each.detail or "ok"),
            )
            for each in found.findings
        ]
        show(plain_table(("what", "found"), rows))
    if found.faults:
        raise typer.Exit(1)
