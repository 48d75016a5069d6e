"""Label finished pairs, segment by segment."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Unpack

from dpo_video import registry
from dpo_video.data.label import LabelSummary, recipe, summarize
from dpo_video.data.label import label as label_pairs
from dpo_video.data.labels import FOLDER, LabelSet
from dpo_video.data.segments import SECONDS
from dpo_video.data.store import PairStore
from dpo_video.errors import UserError
from dpo_video.paths import check_name
from dpo_video.strategies import StoreLabeler, Strategy
from dpo_video.support.claims import WRITER, claim
from dpo_video.support.interrupts import StopSignal
from dpo_video.workflows.options import Options, checked, configure, with_options
from dpo_video.workflows.pairs import opened
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.session import check_pairs, load_model, pick_device


@with_options
@checked
def label(
    pairs: PairStore | Path | str,
    labeler: Strategy | str | None = None,
    *,
    name: str | None = None,
    seconds: float = SECONDS,
    progress: Progress = SILENT,
    **options: Unpack[Options],
) -> LabelSummary:
    """Label finished pairs, or the rest of them after an interruption.

    Labels are kept in PAIRS/labels, one set per name, and never overwritten.

    Args:
        pairs: The pairs, or their folder.
        labeler: The labeler or its name.
        name: The name of the labels; the labeler's by default.
        seconds: Length of a segment, s.
        progress: Receives the progress.
        options: See `Options`. By default the videos are decoded with the backbone that the pairs
            were made with.
    """
    store = opened(pairs)
    if not store.local:
        raise UserError(
            f"'{store.where}' is read-only. Copy the pairs to this machine, label them there, "
            "and copy the folder labels/ back."
        )
    needed = ("backbone", "labeler", "metric")
    config = configure("train", {**options, "labeler": labeler}, store, kinds=needed)
    if config.labeler is None:
        raise UserError("label needs --labeler NAME (see `dpo-video list labeler`).")
    table = config.tables["labeler"]
    relevant = {key: table[key] for key in table if key not in config.labeler.incidental}
    model = load_model(config, pick_device(config.run.device))
    check_pairs(config, store, model)
    chosen = name or registry.short_name(table["name"])
    check_name(chosen, "labels")
    instead = "label under another name with --as"
    with claim(store.folder / FOLDER, f".{chosen}{WRITER}", instead=instead):
        labels = LabelSet.open_or_create(
            store.folder, chosen, recipe(store, model, relevant, seconds)
        )
        figures: Counter[str] = Counter()
        try:
            if isinstance(config.labeler, StoreLabeler):
                with suppress(KeyboardInterrupt):
                    list(label_pairs(store, model, config.labeler, labels, progress.note))
            else:
                progress.update("pairs", len(labels.done()), len(store))
                for report in label_pairs(store, model, config.labeler, labels):
                    figures.update(report.figures)
                    progress.update("pairs", report.done, report.total)
        except StopSignal as signal:
            signal.done = f"{summarize(store, labels, figures).summary}. Stopped."
            raise
        summary = summarize(store, labels, figures)
        if summary.all_ties:
            metrics = "by metrics (--labeler metric)"
            if "weights" in table:
                metrics = "by other metrics (--set labeler.weights.NAME=1)"
            vetoes = "without vetoes (--set labeler.guards={}), " if table.get("guards") else ""
            progress.note(
                f"All labels in '{summary.labels}' are ties, from which there is nothing to learn. "
                f"Label the pairs under another name (--as NAME): {vetoes}{metrics} or by people "
                "(--labeler page).",
                warning=True,
            )
        return summary
