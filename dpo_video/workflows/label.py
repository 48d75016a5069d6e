"""Label finished pairs, segment by segment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Unpack

from dpo_video.data.label import label as label_pairs
from dpo_video.data.label import recipe
from dpo_video.data.labels import Agreement, LabelSet, agreement, names
from dpo_video.data.segments import SECONDS
from dpo_video.data.store import PairStore
from dpo_video.errors import UserError
from dpo_video.strategies import StoreLabeler, Strategy
from dpo_video.workflows.config import Options, configure
from dpo_video.workflows.pairs import opened
from dpo_video.workflows.progress import SILENT, Progress
from dpo_video.workflows.session import load_model, pick_device


@dataclass(frozen=True, kw_only=True)
class LabelSummary:
    """A set of labels, and how it compares with the others of the same pairs."""

    store: PairStore
    labels: LabelSet
    figures: Mapping[str, float]
    """What this call cost, by name: requests, tokens, US dollars."""

    @property
    def segments(self) -> list[dict[str, Any]]:
        """Per segment: its frames, and the share of pairs in which each video is better."""
        labelled = list(self.labels.labels().values())
        rows = []
        for i, frames in enumerate(self.labels.recipe.segments):
            signs = Counter(int(label[i].sign()) for label in labelled)
            counts = {"first": signs[1], "second": signs[-1], "tie": signs[0]}
            shares = {name: count / max(1, len(labelled)) for name, count in counts.items()}
            rows.append({"frames": list(frames), **shares})
        return rows

    @property
    def agreement(self) -> dict[str, Agreement]:
        """Agreement with the store's other labels of equal segments, and between raters."""
        found, own = {}, self.labels
        for name in names(self.store.folder):
            other = LabelSet(self.store.folder, name)
            if name != own.name and other.recipe.segments == own.recipe.segments:
                found[f"{own.name} and {name}"] = agreement(own.verdicts(), other.verdicts())
        for one, two in combinations(own.raters, 2):
            both = f"{one or 'no name'} and {two or 'no name'}"
            found[both] = agreement(own.labels_by(one), own.labels_by(two))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain values."""
        return {
            "labels": str(self.labels.path),
            "pairs": len(self.store),
            "labelled": len(self.labels.labels()),
            "segments": self.segments,
            "agreement": {both: found.model_dump() for both, found in self.agreement.items()},
            "figures": dict(self.figures),
        }


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
            f"'{store.where}' can be read only. Copy the pairs to this machine, label them there, "
            "and copy the folder labels/ back."
        )
    config = configure("train", {**options, "labeler": labeler}, store)
    if config.labeler is None:
        raise UserError("label needs --labeler NAME (see `dpo-video list labeler`).")
    table = config.tables["labeler"]
    relevant = {key: table[key] for key in table if key not in config.labeler.incidental}
    model = load_model(config, pick_device(config.run.device))
    store.check_fits(model)
    labels = LabelSet.open_or_create(
        store.folder, name or str(table["name"]), recipe(store, model, relevant, seconds)
    )
    figures: Counter[str] = Counter()
    if isinstance(config.labeler, StoreLabeler):
        with suppress(KeyboardInterrupt):
            list(label_pairs(store, model, config.labeler, labels))
    else:
        progress.update("pairs", len(labels.done()), len(store))
        for report in label_pairs(store, model, config.labeler, labels):
            figures.update(report.figures)
            progress.update("pairs", report.done, report.total)
    return LabelSummary(store=store, labels=labels, figures=figures)
