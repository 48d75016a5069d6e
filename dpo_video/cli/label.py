"""`dpo-video label`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo_video.cli.build import progress_bar
from dpo_video.cli.options import Assignments, Backbone, Device, File, Json, console, resolve
from dpo_video.errors import UserError

if TYPE_CHECKING:
    from dpo_video.data.labels import Agreement, LabelSet
    from dpo_video.data.store import PairStore


def label(
    pairs: Annotated[str, typer.Argument(help="A folder of pairs.")],
    labeler: Annotated[
        str | None, typer.Option("--labeler", help="Who labels: metric, vlm, page, recorded, ...")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--as", help="The labels' name; the labeler's if left out.")
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, help="Length of a segment.")
    ] = 1.0,
    backbone: Backbone = None,
    assignments: Assignments = None,
    file: File = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Label finished pairs, segment by segment. Goes on where it was stopped.

    Labels are kept in PAIRS/labels, one set a name, and never overwritten. Train on them with
    dpo-video train --pairs PAIRS --labels NAME.
    """  # fmt: skip
    from dpo_video.data.label import label as label_pairs
    from dpo_video.data.label import recipe
    from dpo_video.data.labels import LabelSet
    from dpo_video.data.store import PairStore
    from dpo_video.strategies import StoreLabeler
    from dpo_video.workflows.session import load_model, made_with, pick_device

    store = PairStore(pairs)
    if not store.local:
        raise UserError(
            f"'{pairs}' can be read only. Copy the pairs to this machine, label them there, and "
            "copy the folder labels/ back."
        )
    # Without a word on it, it is the one that the pairs were made with.
    own = made_with(store) if backbone is None and file is None else {"backbone": backbone}
    config = resolve(file, assignments, labeler=labeler, run_device=device, **own)
    if config.labeler is None:
        raise UserError(
            "Who labels? Name a labeler: --labeler NAME (see `dpo-video list labeler`)."
        )
    table = config.tables["labeler"]
    settled = {key: table[key] for key in table if key not in config.labeler.incidental}
    model = load_model(config, pick_device(config.run.device))
    store.check_fits(model)
    name = name or str(table["name"])
    book = LabelSet.open_or_create(store.folder, name, recipe(store, model, settled, seconds))
    figures: Counter[str] = Counter()
    if isinstance(config.labeler, StoreLabeler):
        with suppress(KeyboardInterrupt):
            list(label_pairs(store, model, config.labeler, book))
    else:
        with progress_bar() as bar:
            task = bar.add_task("pairs", total=len(store), completed=len(book.done()))
            for report in label_pairs(store, model, config.labeler, book):
                figures.update(report.figures)
                bar.update(task, completed=report.done)
    if as_json:
        typer.echo(json.dumps(_summary(store, book, figures), indent=2))
    else:
        _print(store, book, figures)


def _summary(store: PairStore, book: LabelSet, figures: Mapping[str, float]) -> dict[str, Any]:
    agreements = {both: found.model_dump() for both, found in _agreements(store, book).items()}
    return {
        "labels": str(book.path),
        "pairs": len(store),
        "labelled": len(book.labels()),
        "segments": [
            {"frames": list(frames), **shares}
            for frames, shares in zip(book.recipe.segments, _shares(book), strict=True)
        ],
        "agreement": agreements,
        "figures": dict(figures),
    }


def _shares(book: LabelSet) -> list[dict[str, float]]:
    """Per segment, the share of the labelled pairs in which the first or second is better."""
    labels = list(book.labels().values())
    shares = []
    for i in range(len(book.recipe.segments)):
        signs = Counter(int(label[i].sign()) for label in labels)
        counted = {"first": signs[1], "second": signs[-1], "tie": signs[0]}
        shares.append({key: count / max(1, len(labels)) for key, count in counted.items()})
    return shares


def _agreements(store: PairStore, book: LabelSet) -> dict[str, Agreement]:
    """Of this book with the store's others of the same segments, and among its raters."""
    from itertools import combinations

    from dpo_video.data.labels import LabelSet, agreement, names

    found = {}
    for name in names(store.folder):
        other = LabelSet(store.folder, name)
        if name != book.name and other.recipe.segments == book.recipe.segments:
            both = f"{book.name} and {name}"
            found[both] = agreement(book.verdicts(), other.verdicts())
    for one, two in combinations(book.raters, 2):
        both = f"{one or 'no name'} and {two or 'no name'}"
        found[both] = agreement(book.labels_by(one), book.labels_by(two))
    return found


def _print(store: PairStore, book: LabelSet, figures: Mapping[str, float]) -> None:
    out = Console()
    labelled = len(book.labels())
    out.print(f"{labelled} of {len(store)} pairs have labels: [bold]{escape(str(book.path))}[/]")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("frames", "first better", "second better", "tie"):
        table.add_column(column, justify="right")
    for (start, stop), shares in zip(book.recipe.segments, _shares(book), strict=True):
        table.add_row(f"{start}-{stop - 1}", *(f"{share:.0%}" for share in shares.values()))
    out.print(table)
    for both, found in _agreements(store, book).items():
        kappa = "undefined" if found.kappa is None else f"{found.kappa:.2f}"
        share = "nothing in common" if found.share is None else f"{found.share:.0%} alike"
        out.print(f"Agreement of [cyan]{escape(both)}[/]: {share} of {found.segments} segments, "
                  f"Cohen's kappa {kappa}")  # fmt: skip
    for figure, value in figures.items():
        out.print(f"{figure}: {value:.6g}", highlight=False)
    if labelled:
        console.print(f"Train on them: [bold]dpo-video train --pairs {store.folder} "
                      f"--labels {book.name}[/]")  # fmt: skip
