"""`dpo-video check`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from dpo_video.cli.build import progress_bar
from dpo_video.cli.options import Assignments, Backbone, Device, File, Json, Metrics, resolve


def check(
    pairs: Annotated[str, typer.Argument(help="A folder of pairs, or its URL.")],
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", help="Labels to check instead of the pairs' own."),
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", min=0, help="Pairs to decode and compare the motion of.")
    ] = 32,
    backbone: Backbone = None,
    metric: Metrics = None,
    assignments: Assignments = None,
    file: File = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Look for what would spoil a training, before it costs anything.

    Exit code 0 if there is no problem (what is only worth a look does not count), 1 if there is
    one, 2 if the command itself was wrong.
    """  # fmt: skip
    from dpo_video.data.audit import audit
    from dpo_video.data.store import PairStore
    from dpo_video.workflows.session import apply_labels, load_model, made_with, pick_device

    store = PairStore(pairs)
    # Without a word on it, it is the one that the pairs were made with.
    own = made_with(store) if backbone is None and file is None else {"backbone": backbone}
    config = resolve(
        file, assignments, metrics=metric, run_device=device, train_labels=labels or None, **own
    )
    model = load_model(config, pick_device(config.run.device))
    store = apply_labels(config, store).store
    prompts = config.backbone.prompts(config.evaluate.seeds)
    with progress_bar() as bar:
        task = bar.add_task("pairs", total=len(store))
        found = audit(
            store,
            model,
            config.metrics,
            prompts,
            sample=sample,
            on_progress=lambda done: bar.update(task, completed=done),
        )
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        out = Console()
        out.print(found.table())
        out.print(f"\n{found.summary}", highlight=False)
    raise typer.Exit(1 if found.problems else 0)
